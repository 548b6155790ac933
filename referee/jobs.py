"""Work that several processes share: each takes what no other one has (runs.Work.go)."""
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading

import torch

from harness import UserError

SECONDS = 2                                     # between two looks at what is stored


def leave_with_parent():
    """End this process when its parent has ended, however that was."""
    multiprocessing.parent_process().join()
    os._exit(1)


def child(number, mistakes, make_work, arguments):
    """One process: it begins with a seed of its own, so that the seeds' models are built side by side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                    # on Windows it is not inherited
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        work = make_work(*arguments)
        first = number % len(work.seeds)
        work.seeds = work.seeds[first:] + work.seeds[:first]
        for _ in work.go():
            pass
    except (UserError, OSError) as mistake:
        mistakes.put(str(mistake))
        sys.exit(2)


def run(jobs, make_work, arguments, show):
    """Do the work in so many processes; show() is called now and then. If one of them fails, all end."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"                         # the children read it when they load torch
    mistakes = context.SimpleQueue()
    children = [context.Process(target=child, daemon=True, args=(number, mistakes, make_work, arguments))
                for number in range(jobs)]
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C is for this process alone
    try:
        for process in children:
            process.start()
        signal.signal(signal.SIGINT, interrupt)
        running = True
        while running:
            running = [process.sentinel for process in children if process.is_alive()]
            multiprocessing.connection.wait(running, timeout=SECONDS)
            failed = [process.exitcode for process in children if process.exitcode]
            if failed:
                raise UserError(mistakes.get() if not mistakes.empty() else
                                f"a process of --jobs ended with exit code {failed[0]}. What is stored is "
                                "safe, and the same command goes on")
            show()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for process in children:
            if process.pid:
                process.terminate()
                process.join()
