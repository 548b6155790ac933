"""Do the losses that rank samples gain from as many samples as filtering had in the comparison?

    python benchmarks/sixteen_samples.py --seeds 100,101,102     # six minutes a seed, two more to build

The comparison's grids offered filtering 16 samples of a prompt, RRHF and PRO at most 8. Here the two have 16,
with settings around their chosen ones, beside the chosen ones and filtering with 8 and with 16. The seeds are
those of the tuning, not those that are reported. Means with 95% t-intervals over seeds.
"""
import argparse
import importlib
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import harness
from experiments.comparison import ARMS
from referee.comparison import tuned
from referee.statistics import plus_minus, t_interval

GRID = {"RRHF": {"lr": (1.5e-3, 3e-3, 6e-3), "epochs": (1.0, 2.0)},
        "PRO": {"lr": (7.5e-4, 1.5e-3, 3e-3), "epochs": (1.0, 2.0)}}
COLUMNS = {"eval/win_rate_judge": "win rate by judge", "eval/gold": "gold", "eval/fluency": "fluency",
           "cpu_seconds": "CPU s"}


def arms(chosen):
    """{name: options with "method"}; chosen: {arm: its settings in the comparison}."""
    found = {}
    for n in (8, 16):
        found[f"filter, {n}"] = ARMS["filter"]["arm"] | chosen["filter"] | {"candidates": n}
    for name, grid in GRID.items():
        found[f"{name}, as chosen: {chosen[name]['candidates']}"] = ARMS[name]["arm"] | chosen[name]
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values))
            words = ", ".join(f"{k} {v:g}" for k, v in settings.items())
            found[f"{name}, 16, {words}"] = ARMS[name]["arm"] | settings | {"candidates": 16}
    return found


def result_of(settings, seed, folder):
    """The metrics of a run."""
    method = importlib.import_module(settings["method"])
    options = {k: v for k, v in settings.items() if k != "method"}
    config = method.Config(seed=seed, quiet=True, out=str(folder), eval_prompts=512, eval_samples=8,
                           **options)
    return harness.launch(method.train, config, known={})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="100,101,102")
    seeds = [int(seed) for seed in parser.parse_args().seeds.split(",")]
    chosen = {name: settings for name, (settings, _) in tuned()[2].items() if name in ARMS}
    print(f"{'arm':32}" + "".join(f"{name:>20}" for name in COLUMNS.values()), flush=True)
    for name, settings in arms(chosen).items():
        with tempfile.TemporaryDirectory() as folder:
            runs = [result_of(settings, seed, Path(folder) / str(seed)) for seed in seeds]
        cells = [plus_minus(*t_interval([run[metric] for run in runs])) for metric in COLUMNS]
        print(f"{name:32}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
