"""The workshop kit: planted bugs are found by the tests that bugs.md names; cards; the scripts.

The bugs are hunted in a copy of the project, by one more process: this file, run as a script. There, all
modules of the project are loaded anew for each bug; torch and transformers are loaded once.
"""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "docs" / "workshop"
PATCHES = sorted(path.stem for path in (KIT / "bugs").glob("*.patch"))
every_bug = pytest.mark.parametrize("bug", PATCHES)


def read(path):
    return path.read_text(encoding="utf-8")


def parts(text):
    """{heading: text below it}, of the headings of the second level."""
    return {head.strip(): body for head, body in re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", text)}


def command_of(bug):
    """(file, what -k selects) of the command under the bug's heading."""
    section = parts(read(KIT / "bugs.md"))[bug]
    return re.search(r"`python -m pytest (tests/test_\w+\.py) -k (\w+)`", section).groups()


@pytest.fixture
def script(monkeypatch):
    """Load a script of the kit as a module."""
    monkeypatch.setattr(sys, "path", [str(KIT), *sys.path])

    def load(name):
        for needed in ("scipy", "matplotlib") if name == "collect" else ():
            pytest.importorskip(needed)
        return importlib.import_module(name)
    return load


# ----------------------------------------------------------------------------------------------- planted bugs

def copy_of_the_project(folder):
    left_out = ".git", "cache", "runs", "results", "__pycache__", "*.egg-info", ".venv"
    return shutil.copytree(ROOT, folder / "project", ignore=shutil.ignore_patterns(*left_out))


@pytest.fixture(scope="module")
def hunted(tmp_path_factory):
    """{"clean": outcomes of all bugs' tests, bug: outcomes with this bug}, as run_tests returns them.

    A bug whose patch does not fit has no outcomes.
    """
    project = copy_of_the_project(tmp_path_factory.mktemp("hunt"))
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-B", project / "tests" / Path(__file__).name], cwd=project,
                          capture_output=True, text=True, encoding="utf-8", timeout=900,
                          env=plain | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(project)})
    found = re.search(r"(?m)^HUNTED (.+)$", done.stdout)
    assert done.returncode == 0 and found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1])


def hunt():
    """Run each bug's test in the project around this file, with and without the bug; prints JSON lines."""
    sys.path.insert(0, str(KIT))
    import plant
    files, words = zip(*map(command_of, PATCHES))
    found = {"clean": run_tests({*files}, " or ".join(f"({word})" for word in words))}
    for bug, file, word in zip(PATCHES, files, words):
        name, clean, planted = plant.read_patch(read(KIT / "bugs" / f"{bug}.patch"))
        if plant.exchange(ROOT / name, clean, planted):
            found[bug] = run_tests([file], word)
            plant.exchange(ROOT / name, planted, clean)
    print("\nHUNTED", json.dumps(found), flush=True)


def run_tests(files, words):
    """{"file::test": "passed", or the phase in which it failed}; the project is loaded anew."""
    for name, module in list(sys.modules.items()):
        home = getattr(module, "__file__", None) or ""
        if name not in ("__main__", "plant") and Path(home).is_relative_to(ROOT):
            del sys.modules[name]
    outcomes = {}

    def pytest_runtest_logreport(report):
        if report.failed or report.when == "call" and report.passed:
            outcomes[report.nodeid] = "passed" if report.passed else report.when

    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--tb=no",
                 *(str(ROOT / file) for file in files), "-k", words],
                plugins=[SimpleNamespace(pytest_runtest_logreport=pytest_runtest_logreport)])
    assert Path(sys.modules["common"].__file__).parent == ROOT, "the tests ran on another copy of the project"
    return outcomes


@every_bug
def test_planted_bug_is_not_found_by_its_test_or_the_test_fails_without_it(hunted, bug):
    assert bug in hunted, "the patch does not fit today's code"
    planted, section = hunted[bug], parts(read(KIT / "bugs.md"))[bug]
    file, word = command_of(bug)
    assert {*planted} == {test for test in hunted["clean"] if file in test and word.lower() in test.lower()}
    assert {hunted["clean"][test] for test in planted} == {"passed"}
    assert "call" in planted.values()                                        # and not: cannot be imported
    named = set(re.findall(r"`(test_\w+)` (?:and|in)", section))
    assert named == {re.search(r"::(\w+)", test)[1] for test in planted}, "bugs.md names other tests"


def faults_of_a_patch(text):
    changed = [line for line in text.splitlines() if re.match(r"[-+](?![-+])", line)]
    sizes = [sum(line[0] == sign for line in changed) for sign in "-+"]
    long = [line for line in changed if len(line) > 111]
    return [fault for fault, there in (("several hunks", text.count("\n@@ ") != 1), ("long line", long),
                                       (f"{sizes} lines", not all(1 <= n <= 3 for n in sizes))) if there]


def test_patches_are_not_ten_small_ones_or_bugs_md_knows_others():
    assert PATCHES == [f"{n:02}" for n in range(1, 11)] == list(parts(read(KIT / "bugs.md")))
    assert not [fault for bug in PATCHES for fault in faults_of_a_patch(read(KIT / "bugs" / f"{bug}.patch"))]
    good = "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"
    assert not faults_of_a_patch(good)
    assert faults_of_a_patch(good + "@@ -9 +9 @@\n") == ["several hunks"]
    assert faults_of_a_patch(good + "+c" * 60) == ["long line"]
    assert faults_of_a_patch(good + "+c\n" * 3) == ["[1, 4] lines"]


def test_bug_has_no_symptom_three_hints_test_or_story():
    for bug, text in parts(read(KIT / "bugs.md")).items():
        folded = re.findall(r"<details><summary>(.+?)</summary>\n\n.+?\n</details>", text, re.S)
        assert text.startswith("\n**Symptom.** ") and text.count("<details>") == 5, bug
        assert folded == ["Hint 1", "Hint 2", "Hint 3", "Test", "Fix and story"], bug


def test_patch_does_not_apply_with_git_or_plant_py_does_something_else(tmp_path):
    """Git may be missing, where the project came as a zip file."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    for bug in PATCHES:
        name = re.search(r"(?m)^\+\+\+ b/(.+)$", read(KIT / "bugs" / f"{bug}.patch")).group(1)
        homes = [tmp_path / way / bug for way in ("git", "plant")]
        for home in homes:
            shutil.copytree(KIT, home / "docs" / "workshop")
            shutil.copy(ROOT / name, home / name)
        def git(*words):
            return subprocess.run(["git", *words, f"docs/workshop/bugs/{bug}.patch"], cwd=homes[0],
                                  env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
                                  capture_output=True, text=True)

        def plant(*words):
            return subprocess.run([sys.executable, "docs/workshop/plant.py", bug, *words], cwd=homes[1],
                                  capture_output=True, text=True)

        clean = (ROOT / name).read_bytes()
        assert git("apply").returncode == 0 and plant().returncode == 0, bug
        planted = [(home / name).read_bytes() for home in homes]
        assert planted[0] == planted[1] != clean
        assert plant().returncode == 1 and (homes[1] / name).read_bytes() == planted[1]           # not twice
        assert git("apply", "-R").returncode == 0 and plant("--undo").returncode == 0
        assert [(home / name).read_bytes() for home in homes] == [clean, clean]
        undone = plant("--undo")
        assert undone.returncode == 1
        assert f"bug {bug} is not in the code: it was mended already" in undone.stderr
        assert plant().returncode == 0
        (homes[1] / name).write_bytes(planted[1].replace(b"\n", b"\n\n"))             # mended in another way
        undone = plant("--undo")
        assert undone.returncode == 1 and "changed in another way. To get the original back" in undone.stderr


def test_planting_changes_ends_of_lines_or_takes_one_of_two_places(tmp_path, script):
    exchange, file = script("plant").exchange, tmp_path / "x.py"
    file.write_bytes(b"a\r\nb\r\nc\r\n")
    assert exchange(file, "b\nc\n", "d\n") and file.read_bytes() == b"a\r\nd\r\n"
    assert not exchange(file, "b\n", "e\n") and file.read_bytes() == b"a\r\nd\r\n"
    file.write_bytes(b"a\na\n")
    assert not exchange(file, "a\n", "b\n") and file.read_bytes() == b"a\na\n"


# ------------------------------------------------------------------------------------------------------ cards

CARD = ("Question.", "Your prediction.", "Command.", "Seconds.", "Write down.")


def faults_of_a_card(text, pages):
    """What a card lacks, and numbers of its answer that do not stand in these parts of a page."""
    faults = [f"no {word}" for word in CARD if f"**{word}**" not in text]
    question, _, answer = text.partition("<details><summary>Answer")
    faults += [] if answer.rstrip().endswith("</details>") else ["the answer is not folded away"]
    faults += [] if re.search(r"`python \w+\.py[ `]", question) else ["no command"]
    known = set(re.findall(r"\d+\.\d+", pages))
    return faults + [f"{number} is not on the page" for number in re.findall(r"\d+\.\d+", answer)
                     if number not in known]


def test_card_lacks_a_part_or_its_answer_holds_a_number_of_no_page():
    cards = parts(read(KIT / "cards.md"))
    assert 9 <= len(cards) <= 11 and list(cards)[-1].startswith("Finale")
    for name, text in cards.items():
        method = re.search(r"python (\w+)\.py", text).group(1)
        page = parts(read(ROOT / "docs" / f"{method}.md"))
        assert not faults_of_a_card(text, page["Commands and expected numbers"] + page["Exercises"]), name
    good = "".join(f"**{word}** x\n" for word in CARD) + "`python a.py`\n<details><summary>Answer</summary>\n"
    good += "It is 0.5.\n</details>\n"
    assert not faults_of_a_card(good, "| 0.5 | 1.25 |")
    assert faults_of_a_card(good, "| 0.51 |") == ["0.5 is not on the page"]
    assert faults_of_a_card(good.replace("Write down", "Note"), "0.5") == ["no Write down."]
    assert faults_of_a_card(good.replace("`python a.py`", ""), "0.5") == ["no command"]
    assert faults_of_a_card(good.replace("</details>", ""), "0.5") == ["the answer is not folded away"]


def test_counts_of_seeds_on_cards_are_not_those_of_the_stored_runs():
    def values(method, arm, metric):
        runs = json.loads(read(ROOT / "results" / f"{method}.json"))["runs"]
        return [run[metric] for run in runs if run["arm"] == arm]

    cards, ratio = parts(read(KIT / "cards.md")), "eval/variance/ReMax / REINFORCE, 1 sample"
    plain, shifted = (values("remax", arm, ratio) for arm in ("SFT", "SFT, rewards shifted by prompt"))
    assert [sum(v > 1 for v in plain), sum(v < 1 for v in shifted), len(plain)] == [9, 9, 10]
    text = "above 1 in nine without offsets, and below 1 in nine with them"
    assert text in " ".join(cards["Card 8: what a baseline is for"].split())
    assert text in " ".join(read(ROOT / "docs" / "remax.md").split())
    small, sft = (values("decision_transformer", arm, "eval/gold") for arm in ("DT, 2,875", "SFT"))
    assert [sum(a < b for a, b in zip(small, sft)), len(small), len(sft)] == [7, 10, 10]
    assert "gold is below that of SFT in seven" in " ".join(cards["Card 10: an eighth of the data"].split())
    drawn, direct = (values("rso", arm, "eval/gold") for arm in ("beta 0.5", "sigmoid-norm, direct"))
    assert [sum(a > b for a, b in zip(drawn, direct)), len(drawn), len(direct)] == [8, 10, 10]
    assert "in eight of the ten seeds" in " ".join(cards["Card 6: where pairs come from"].split())
    gold, fluency = (values("ppo", "pushed", f"eval/{name}") for name in ("gold", "fluency"))
    assert [sum(v < 0 for v in gold), len(gold)] == [9, 10] and fluency[gold.index(max(gold))] > 0.95
    assert "gold ends below 0 in nine. In the tenth" in " ".join(cards["Finale: hack the reward"].split())


def test_number_of_a_bug_is_not_on_the_page_that_it_names():
    symptom = parts(read(KIT / "bugs.md"))["08"].partition("<details>")[0]
    number, = re.findall(r"-\d+\.\d+", symptom)
    assert number in read(ROOT / "docs" / "dpo.md")


def test_first_or_last_value_is_of_another_metric_or_rounded(tmp_path, script, monkeypatch, capsys):
    rows = [{"step": 0, "eval/loss": 0.6931471}, {"step": 1, "loss": 0.25, "loss/sft": 2.0},
            {"step": 2, "loss": 1 / 3, "kl": 7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def show(*words):
        monkeypatch.setattr(sys, "argv", ["show.py", *map(str, words)])
        script("show").main()
        return capsys.readouterr().out.splitlines()

    assert show(tmp_path, "loss", "sft", "x") == [
        "eval/loss: first 0.6931471 (step 0), last 0.6931471 (step 0)",
        "loss: first 0.25 (step 1), last 0.3333333333333333 (step 2)",
        "loss/sft: first 2.0 (step 1), last 2.0 (step 1)", "x: no such metric"]
    assert show(tmp_path) == ["eval/loss", "loss", "loss/sft", "kl"]
    assert show(tmp_path, "--all", "loss") == [
        "eval/loss: 0.6931471 (step 0)", "loss: 0.25 (step 1)", "loss: 0.3333333333333333 (step 2)"]
    with pytest.raises(SystemExit, match="give the directory of a run"):
        show(tmp_path / "nothing")


@pytest.mark.parametrize("text, steps", [
    ('{"step": 0}\n{"step": 1}\n', 2), ('{"step": 0}\n{"step": 1}', 2), ('{"step": 0}\n{"step": 1, "lo', 1),
    ('{"step": 0}\n{"step": 1, "\udcff', 1), ('{"step": 0}\n{"st\n{"step": 2}\n', 0), ('{"step": 0, "l', 0),
    ('{"st\n{"step": 1, "l', 0), ("", 0)])
def test_torn_last_line_hides_the_others_or_a_torn_line_among_them_passes(text, steps, tmp_path, script):
    show = script("show")
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    if steps:
        assert show.rows_of(tmp_path) == [{"step": step} for step in range(steps)]
    else:
        with pytest.raises(SystemExit, match="no metrics.jsonl that can be read"):
            show.rows_of(tmp_path)


# ------------------------------------------------------------------------------------- collecting on the wall

def write_run(folder, seed, gold, method="dpo", finished=True, rows=None, **options):
    """A run's directory as harness.Run leaves it, without the weights."""
    from dataclasses import asdict

    from referee.arms import config_class
    folder.mkdir(parents=True)
    config = config_class(method)(seed=seed, out=str(folder), **options)
    args = asdict(config) | {"method": method, "conversations": False, "build": str(seed),
                             "data_fingerprint": "", "other_models": []}
    (folder / "args.json").write_text(json.dumps(args), encoding="utf-8")
    numbers = {"eval/proxy": 1.0, "eval/kl": 2.0, "eval/fluency": 0.9}
    rows = rows or [{"step": 0, "eval/gold": 0.125} | dict.fromkeys(numbers, 0.0), {"step": 1, "loss": 0.6},
                    {"step": 1, "eval/gold": gold} | numbers]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if finished:
        (folder / "samples.txt").write_text("", encoding="utf-8")


def test_wall_mixes_settings_counts_seeds_twice_or_stops_at_bad_runs(tmp_path, script, monkeypatch, capsys):
    collect = script("collect")
    for seed, gold in ((3, 0.5), (1, 0.7), (2, 0.6)):
        write_run(tmp_path / f"{seed} ä", seed, gold, device="cpu" if seed == 3 else "auto")
    write_run(tmp_path / "again", 3, 9.0, save_every=7)                        # after "3 ä", which counts
    write_run(tmp_path / "deep" / "down", 1, 0.25, beta=0.5, temperature=0.7)
    write_run(tmp_path / "ppo", 1, 0.25, method="ppo")
    write_run(tmp_path / "cut", 4, 9.0, finished=False)
    write_run(tmp_path / "torn", 5, 9.0)
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"step": 0, "eval/k', encoding="utf-8")
    write_run(tmp_path / "untrained", 6, 9.0, rows=[{"step": 1, "loss": 0.5}])
    for name, text in (("list", "[1]"), ("old", '{"seed": 1}'), ("bytes", "\udcff")):
        write_run(tmp_path / name, 7, 9.0)
        (tmp_path / name / "args.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for name, odd in (("number", {"method": 5}), ("names", {"method": ["dpo"]}), ("seed", {"seed": "x"}),
                      ("data", {"data_fingerprint": None}), ("unknown", {"method": "\x1b[31m"})):
        write_run(tmp_path / name, 8, 9.0)
        file = tmp_path / name / "args.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | odd), encoding="utf-8")
    write_run(tmp_path / "null", 8, 9.0, rows=[{"step": 0, "eval/kl": None}])
    monkeypatch.setattr(sys, "argv", ["collect.py", str(tmp_path)])
    collect.main()
    text = capsys.readouterr().out
    said = {Path(line.split(": ")[1]).name: line.split(": ", 2)[2] for line in text.splitlines()
            if line.startswith("left out: ")}
    assert set(said) == {"again", "cut", "torn", "untrained", "list", "old", "bytes", "number", "names",
                         "data", "seed", "unknown", "null"}
    assert "seed 3" in said["again"] and "3 ä" in said["again"] and said["cut"] == "not finished"
    assert "another version" in said["old"] and "JSONDecodeError" in said["torn"]
    heads = [line for line in text.splitlines() if ": n = " in line]
    assert heads == ["dpo: n = 3, seeds 1, 2, 3",
                     "dpo --beta 0.5 --temperature 0.7: n = 1 (an interval needs two), seeds 1",
                     "ppo: n = 1 (an interval needs two), seeds 1"]
    rows = [line.split() for line in text.splitlines() if line.startswith("  gold")]
    assert rows[1] == ["gold", "0.250", "+0.125"]                              # one run has no interval
    # by hand: 0.5, 0.6, 0.7: deviation 0.1, t[0.975; 2] = 4.303, half 4.303 0.1 / sqrt(3)
    assert rows[0] == ["gold", "0.600", "±0.248", "+0.475", "±0.248"]
    assert (tmp_path / "wall.png").stat().st_size > 10000


def test_shown_numbers_reach_the_terminal_raw(tmp_path, script, monkeypatch, capsys):
    rows = ['{"step": 0, "a\\u001b[31m": "\\u0007"}', "[1]", '{"kl": 1}', '{"step": 1, "kl": 2}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for words in ([], ["kl"], ["a\x1b[31m"], ["b\x1b"]):
        monkeypatch.setattr(sys, "argv", ["show.py", str(tmp_path), *words])
        script("show").main()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "kl: first 2 (step 1), last 2 (step 1)" in out and "a\\x1b[31m: first \\x07 (step 0)" in out


def test_folder_without_a_finished_run_is_a_traceback(tmp_path, script):
    collect = script("collect")
    with pytest.raises(collect.UserError, match="no finished run"):
        collect.groups_of(tmp_path)


def test_dots_or_interval_on_the_wall_stand_elsewhere(tmp_path, script, monkeypatch):
    collect, drawn = script("collect"), []
    monkeypatch.setattr(collect.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    runs = {seed: ({}, {"eval/gold": gold}, None) for seed, gold in ((0, 1.0), (1, 2.0), (2, 3.0))}
    first = {seed: (dict.fromkeys(last, 0.0), last, where) for seed, (_, last, where) in runs.items()}
    collect.draw({"dpo": first}, tmp_path / "x.png")
    dots, mean, *caps = drawn[0].axes[0].lines
    assert list(dots.get_xdata()) == [1, 2, 3] and mean.get_xdata() == [2]
    half = 4.302652729749464 / 3 ** 0.5                                       # t[0.975; 2], deviation 1
    assert sorted(cap.get_xdata()[0] for cap in caps) == pytest.approx([2 - half, 2 + half])
    assert not list(drawn[0].axes[1].lines[0].get_xdata())                     # not measured


# -------------------------------------------------------------------------------- preparing, checking laptops

def test_prepared_folder_lacks_wheels_or_models_or_they_do_not_arrive(tmp_path, script, monkeypatch, capsys):
    pytest.importorskip("markdown")
    prepare, calls, failing = script("prepare"), [], []
    kit = tmp_path / "kit"
    kit.mkdir()
    for name in prepare.PAGES:
        (kit / f"{name}.md").write_text(f"# {name}", encoding="utf-8")
    shutil.copy(KIT / "pages.css", kit)
    monkeypatch.setattr(prepare, "KIT", kit)
    built = tmp_path / "cache of the teacher" / "reviews" / "0123" / "seed1"
    built.mkdir(parents=True)
    (built / "vitals.json").write_text("{}", encoding="utf-8")

    def run(words, **kwargs):
        calls.append(words[1:])
        return SimpleNamespace(returncode=int(words[2] in failing),
                               stdout=f"SFT gold   0.1\ndirectory   {built}\n")

    def main(*words):
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
        prepare.main()
        return [" ".join(words) for words in calls]

    monkeypatch.setattr(prepare.subprocess, "run", run)
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    stick = tmp_path / "stick"
    assert main("make", stick, "--seeds", 1, "--no_wheels") == ["-m tasks.build --seed 1"]
    assert (stick / "cache" / "reviews" / "0123" / "seed1" / "vitals.json").exists()
    build, download = main("make", stick)                                        # a second time, with wheels
    assert build == "-m tasks.build --seed 0"
    assert download.startswith(f"-m pip download -d {stick / 'wheels'} torch>=2.6 ")
    assert {"matplotlib", "pytest", "scipy"} <= set(download.split())
    install, = main("use", stick)
    assert install.startswith(f"-m pip install --no-index --find-links {stick / 'wheels'} torch>=2.6 ")
    assert (tmp_path / "cache" / "reviews" / "0123" / "seed1" / "vitals.json").exists()
    assert (tmp_path / "kit" / "pages" / "cards.html").exists()
    assert str(tmp_path / "kit" / "pages" / "README.html") in capsys.readouterr().out
    assert main("use", stick, "--no_wheels") == []
    failing.append("pip")
    with pytest.raises(SystemExit, match="pip"):
        main("use", stick)
    with pytest.raises(SystemExit, match="no cache"):
        main("use", tmp_path / "empty")


@pytest.mark.parametrize("fault, said, code", [
    (KeyboardInterrupt(), "stopped: give the same command again\n", 130),
    (OSError(5, "the stick is gone", "E:/x"), "[Errno 5] the stick is gone: 'E:/x'", 1),
    (shutil.Error([("a", "b", "the stick is gone"), ("c", "d", "and more")]), "the stick is gone", 1)])
@pytest.mark.parametrize("there", [False, True])
def test_copy_that_is_cut_off_counts_as_a_build_or_is_a_traceback(there, fault, said, code, tmp_path, script,
                                                                  monkeypatch, capsys):
    prepare = script("prepare")
    stick, target = tmp_path / "stick", tmp_path / "cache" / "reviews" / "0123" / "seed1"
    for folder, text in ((stick / "cache" / "reviews" / "0123" / "seed1", "new"), (target, "old")):
        if there or text == "new":
            (folder / "sft").mkdir(parents=True)
            (folder / "vitals.json").write_text(text, encoding="utf-8")
            (folder / "sft" / f"{text}.bin").write_text(text, encoding="utf-8")

    def main():
        monkeypatch.setattr(sys, "argv", ["prepare.py", "use", str(stick), "--no_wheels"])
        prepare.main()

    def files():
        return sorted(path.relative_to(target.parent).as_posix() for path in target.parent.rglob("*")
                      if path.is_file() and path.suffix != ".lock")

    def cut(source, part):
        with pytest.raises(filelock.Timeout):                     # nobody builds these models meanwhile
            filelock.FileLock(f"{target}.lock").acquire(timeout=0)
        (part / "sft").mkdir(parents=True)
        shutil.copy(source / "vitals.json", part)
        raise fault

    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)
        with pytest.raises(SystemExit) as end:
            main()
    err = capsys.readouterr().err
    assert (end.value.code, err) == (code, said) if code == 130 else end.value.code == f"error: {said}"
    assert files() == ["seed1/sft/old.bin", "seed1/vitals.json"] * there
    (target.parent / "seed1.part").mkdir()                                        # of one that was killed
    (target.parent / "seed1.part" / "x").write_text("", encoding="utf-8")
    main()
    assert files() == ["seed1/sft/new.bin", "seed1/vitals.json"]
    assert (target / "vitals.json").read_text(encoding="utf-8") == "new"


def test_models_are_lost_where_the_new_ones_cannot_get_their_name(tmp_path, monkeypatch):
    import tasks
    real, homes = tasks.put, [tmp_path / "from", tmp_path / "to"]
    for home in homes:
        home.mkdir()
        (home / "x").write_text(home.name, encoding="utf-8")

    def put(part, path):
        if part.suffix == ".part":
            raise PermissionError("a virus scanner reads it")
        return real(part, path)

    monkeypatch.setattr(tasks, "put", put)
    with pytest.raises(PermissionError):
        tasks.copy_directory(*homes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]
    assert (homes[1] / "x").read_text(encoding="utf-8") == "to"


def test_laptop_without_packages_gets_a_traceback_from_use(tmp_path, script, monkeypatch):
    prepare = script("prepare")
    (tmp_path / "cache" / "reviews" / "0123" / "seed0").mkdir(parents=True)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "use", str(tmp_path), "--no_wheels"])
    with pytest.raises(SystemExit, match="error: filelock not installed. First: python .*prepare.py use "):
        prepare.main()


def test_answers_lie_open_without_network(tmp_path, script, monkeypatch):
    pytest.importorskip("markdown")
    prepare = script("prepare")
    prepare.write_pages(tmp_path / "pages")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "pages").iterdir()}
    assert {*pages} == {*prepare.PAGES, "to_print"}
    for name, folds in (("cards", 11), ("bugs", 50), ("to_print", 0), ("README", 1)):
        assert pages[name].count("<details>") == pages[name].count("</details>") == folds, name
        assert "<table>" in pages[name] or name != "README"
        assert not re.search(r'href="(?!(README|cards|bugs)\.html)|\]\(', pages[name]), name
    assert "<code>python dpo.py</code>" in pages["to_print"] and "0.684" not in pages["to_print"]
    assert "0.684" in pages["cards"] and 'href="cards.html"' in pages["README"]


def test_laptop_without_packages_gets_a_traceback_from_make(tmp_path, script, monkeypatch):
    prepare = script("prepare")
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name != "filelock")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "make", str(tmp_path / "stick")])
    with pytest.raises(SystemExit, match=r"error: filelock not installed. First: python -m pip install -e "):
        prepare.main()
    assert not (tmp_path / "stick").exists()


def test_what_is_missing_on_a_laptop_passes_or_what_is_there_does_not(tmp_path, script, monkeypatch, capsys):
    check = script("check")
    from tasks import build
    versions = {"torch": "2.13.0+cpu", "numpy": "2.4.6"}

    def version(name):
        if name not in versions:
            raise check.importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(check.importlib.metadata, "version", version)
    monkeypatch.setattr(build.tasks, "CACHE", tmp_path)
    found, fix = check.cache()
    assert found == "models of seed 0: not built" and "python -m tasks.build --seed 0 " in fix
    home = build.home(SimpleNamespace(seed=0, layers=1))
    home.mkdir(parents=True)
    (home / "vitals.json").write_text("{}", encoding="utf-8")
    good = (check.python_version((3, 10, 0)), check.package("torch>=2.6"), check.package("torch>=2.6,<3"),
            check.package("numpy"), check.disk(2e9), check.terminal("UTF-8"), check.one_step(), check.cache())
    bad = (check.python_version((3, 9, 18)), check.package("torch>=2.14"), check.package("torch>=2.6,<2.13"),
           check.package("scipy"), check.disk(1e8), check.terminal("cp1252"))
    assert not any(fix for _, fix in good) and all(fix for _, fix in bad)
    monkeypatch.setattr(sys, "argv", ["check.py"])
    with pytest.raises(SystemExit) as end:
        check.main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and len(lines) == 5 + len(check.requirements())
    assert all(re.match("OK     .|TO DO  .+: .", line) for line in lines)
    versions |= {re.split("[<>]", wanted)[0]: "4.99" for wanted in check.requirements()}
    monkeypatch.setattr(check, "terminal", lambda: ("a line", ""))
    with pytest.raises(SystemExit) as end:
        check.main()
    assert end.value.code == 0 and "TO DO" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    OSError('[WinError 126] The module could not be found.\nError loading "c10.dll" or one that it needs.'),
    ImportError("DLL load failed while importing _C: The specified module could not be found.")])
def test_windows_lacks_a_library_and_is_told_to_install_packages(error, script, monkeypatch, capsys):
    check = script("check")

    class Broken:
        @staticmethod
        def find_spec(name, *_):
            if name == "torch":
                raise error

    def said(windows):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "torch")
            patch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
            patch.setattr(check, "WINDOWS", windows)
            patch.setattr(sys, "argv", ["check.py"])
            with pytest.raises(SystemExit) as end:
                check.main()
        line, = [line for line in capsys.readouterr().out.splitlines() if "forward and backward" in line]
        return end.value.code, line

    code, line = said(windows=True)
    assert code == 1 and "install the Visual C++ Redistributable (vc_redist.x64.exe, on the stick)" in line
    assert line.startswith("TO DO  forward and backward pass: ") and "odule could not be found." in line
    assert "install the packages first" in said(windows=False)[1]
    monkeypatch.setattr(check, "WINDOWS", True)
    assert "Visual" not in check.cure(error)                                  # torch is there: something else
    monkeypatch.delitem(sys.modules, "torch")
    missing = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert check.cure(missing) == "install the packages first (torch is missing)"


if __name__ == "__main__":
    hunt()
