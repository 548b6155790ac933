"""Preference data from a file or a hub data set, as a Task without a gold reward.

JSONL (plain or gzipped), a JSON array or a table; shapes.py knows the shapes of known data sets. One object a
line, all lines of one kind:

    pair           {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"}: two transcripts that share all
                   but the last answer, as text in Anthropic's HH form or as lists of messages
    ranking        {"prompt", "responses": [...], "scores": [...]}, higher is better; "systems": [...] may
                   name the writers ("completions" and "rewards" are understood too)
    demonstration  {"prompt", "completion"}, with "attributes": {name: int} for SteerLM ("response" is
                   understood too)
    prompt         {"prompt"} alone, for methods that sample their own responses

A list of {"role", "content"} messages may stand for a prompt or an answer, and makes the row a chat: its
prompt goes through the tokenizer's chat template. HH transcripts keep their own "Human:" and "Assistant:".

A line that cannot be used is an error: nothing is guessed. `skip_bad_rows` leaves such lines out and counts
them.
"""
import glob
import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import zlib
from bisect import bisect_left
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from common import CONTROL, UserError, warn
from tasks import Demonstration, Pair, Ranking, Task, hub, shapes, words
from tasks.chat import Prompt, render as render_chat

KIND_OF_FIELD = {
    "chosen": "pair", "rejected": "pair", "responses": "ranking", "completions": "ranking",
    "completion": "demonstration", "response": "demonstration", "scores": "ranking", "rewards": "ranking"}
KNOWN = ('known: "prompt" alone or with chosen + rejected, responses + scores or completion; '
         'or chosen + rejected alone')
HH_ANSWER, HH_HUMAN = "\n\nAssistant:", "\n\nHuman:"
# JSON can hold one as an escape; UTF-8 cannot, and so no tokenizer can.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
TEST_SHARE, LARGEST_SCORE = 0.1, 1e30                # of a score: float32 holds it, with some room
TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}       # what `datasets` reads
USED = {"pair": {"prompt", "chosen", "rejected"}, "prompt": {"prompt"},
        "ranking": {"prompt", "responses", "completions", "scores", "rewards", "systems"},
        "demonstration": {"prompt", "completion", "response", "attributes"}}


def require(condition, where: str, problem: str):
    if not condition:
        raise UserError(f"{where}: {problem}")


def ask_hub(call, dataset: str, **arguments):
    # HTTPError: no network. OSError: unknown id or file, or offline mode. HFValidationError: a malformed id.
    try:
        return call(dataset, repo_type="dataset", **arguments)
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(f"cannot read {dataset} from the hub ({type(error).__name__}); "
                        "pass a local .jsonl file instead") from error


def choose_file(dataset: str, files: list[str]) -> str:
    """The .jsonl file of a hub data set; without one, the files of a form that `datasets` reads."""
    for forms in ((".jsonl", ".jsonl.gz"), tuple(TABLES)):
        named = [file for file in files if file.endswith(forms)]
        train = [file for file in named if "train" in file]
        if len(named) == 1 or len(train) == 1:
            return (train or named)[0]
        if named:
            raise UserError(f"{dataset} has several files; write {dataset}:FILE with one of "
                            f"{', '.join(named)}")
    raise UserError(f"{dataset} has no file of a known form ({', '.join(['.jsonl', *TABLES])}); pass a local "
                    "file instead")


def locate(source: str) -> tuple[Path, str]:
    """The file to read, and the task's name."""
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source} is a directory; pass one file (.jsonl, .json, .parquet, .csv)")
    if path.exists() and not path.is_file():
        raise UserError(f"{source} is no regular file, and it is read twice: write it to a .jsonl file first")
    if path.exists():
        return path, re.sub(r"\.(jsonl?|parquet|csv|arrow)(\.gz)?$", "", path.name)
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(.+))?", source)
    meant_as_path = "/" in source and path.parent.is_dir()
    if not named or meant_as_path or named[1].endswith((".jsonl", ".jsonl.gz", ".json", *TABLES)):
        raise UserError(f"no such file: {source}")
    dataset, file = named.groups()
    hub.check_hub(dataset, file, "dataset")
    # A named file needs no listing, so it is also found in the hub's cache when there is no network.
    file = file or choose_file(dataset, ask_hub(HfApi().list_repo_files, dataset))
    return Path(ask_hub(HfApi().hf_hub_download, dataset, filename=file)), dataset


def read_lines(path: Path):
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from enumerate(file, start=1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path.name}: cannot be read to the end ({error})") from error


def read_table(path: Path, form: str):
    """The rows of a parquet, CSV or arrow file, by the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{path.name} is a {form} file: pip install -e ".[hub]" to read it, or convert it to '
                        ".jsonl") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)               # the reason is in our own line
    where = glob.escape(os.path.abspath(path))                              # else pairs[1].csv is pairs1.csv
    with tempfile.TemporaryDirectory() as folder:
        try:
            table = datasets.load_dataset(form, data_files=where, split="train", cache_dir=folder,
                                          keep_in_memory=True)       # Windows deletes no file that is mapped
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"{path.name} cannot be read as {form}: {reason[:200]}") from None
        yield from enumerate(table, start=1)


def once(entries: list[tuple]) -> dict:
    """The object of these entries. ValueError for a name that comes twice: json would keep the last."""
    twice = [name for name, times in Counter(name for name, _ in entries).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} comes twice in it")
    return dict(entries)


def parse_line(where: str, line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of nested lists
        raise UserError(f"{where}: not JSON that can be read ({error})") from error
    require(isinstance(row, dict), where, "not a JSON object")
    return row


def read_rows(path: Path):
    """(where, how to get the row) of every row; a row that cannot be parsed is an error of its own."""
    form = TABLES.get(path.suffix)
    with open(path, "rb") as file:
        first = file.read(64)
    if first[:4] == b"PAR1":
        form = "parquet"
    if form:
        for number, row in read_table(path, form):
            yield f"{path.name} row {number}", lambda row=row: row
    elif path.suffix == ".json" and first.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"[":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise UserError(f"{path.name}: begins as a JSON array, but cannot be read as one ({error})"
                            ) from None
        for number, row in enumerate(rows, start=1):
            where = f"{path.name} row {number}"
            yield where, lambda row=row, where=where: require(isinstance(row, dict), where,
                                                              "not a JSON object") or row
    else:
        for number, line in read_lines(path):
            if line.strip():
                where = f"{path.name} line {number}"
                yield where, lambda line=line, where=where: parse_line(where, line.strip())


def fields_of(where: str, row: dict) -> tuple[str, list[str]]:
    """The row's kind, and the names of its fields as this row spells them: answers, scores, prompt."""
    kind = next((KIND_OF_FIELD[field] for field in KIND_OF_FIELD if field in row), "prompt")

    def spelled(name, alias):
        return alias if alias in row and name not in row else name

    fields = {"pair": ["chosen", "rejected"],
              "ranking": [spelled("responses", "completions"), spelled("scores", "rewards"), "prompt"],
              "demonstration": [spelled("completion", "response"), "prompt"],
              "prompt": ["prompt"]}[kind]
    for field in fields:
        require(field in row, where, f'missing "{field}"; {KNOWN}')
    return kind, fields


def unused_fields(where: str, row: dict, kind: str) -> list[str]:
    """The fields that are not read. UserError for one that says more than an id or a note."""
    unused = [name for name in row if name not in USED[kind]]
    for name in unused:
        numbered = re.fullmatch(r"(response|answer|completion|output)_?[0-9a-e]", name)
        require(row[name] in ("", []) or not (numbered or name in shapes.MEANINGFUL), where,
                f'"{name}" is not used in a row that is read as a {kind}, and may change what it means: '
                "rename fields with --columns, or take it out of the file")
    return unused


def text_of(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def read_text(where: str, field: str, value) -> str | list[dict]:
    """A string as it is; messages with role and content only, without ids or names."""
    if not isinstance(value, str):
        require(isinstance(value, list)
                and all(isinstance(message, dict) and isinstance(message.get("role"), str)
                        and isinstance(message.get("content"), str) for message in value),
                where, f'"{field}" is neither a string nor a list of {{"role", "content"}} messages')
        value = [{"role": message["role"], "content": message["content"]} for message in value]
    roles = "" if isinstance(value, str) else "".join(message["role"] for message in value)
    require(not LONE_SURROGATE.search(text_of(value) + roles), where, f'"{field}" has half a surrogate pair')
    return value


def split_answer(where: str, field: str, value: str | list[dict], has_prompt: bool) -> tuple:
    """The prompt that stands before an answer in its own field (None if there is none), and the response."""
    if isinstance(value, list):
        require(value and value[-1]["role"] == "assistant", where,
                f'"{field}" does not end with an assistant message')
        return value[:-1] or None, value[-1]["content"]
    if has_prompt:
        return None, value
    before, marker, response = value.rpartition(HH_ANSWER)
    require(marker, where, f'missing "prompt", and "{field}" is no transcript with "\\n\\nAssistant:"')
    return before + marker, response


def special_tokens(tokenizer) -> list[str]:
    """Texts that a tokenizer turns into one special token each: end of text, end of turn and the like."""
    known = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [token.content for token in known if token.special and len(token.content) > 2]


def without_end(special: list[str], text: str) -> str:
    """An answer without the special token that its file ends it with: encode adds one."""
    end = next((token for token in special if text.rstrip().endswith(token)), None)
    return text.rstrip()[:-len(end)] if end else text


def find_faults(row: dict, kind: str, fields: list[str], prompt, answers: dict[str, tuple], special=()):
    """Yields (kind of fault, message) for a row that is well formed and has nothing to learn from."""
    last_turn = prompt if isinstance(prompt, str) else text_of(prompt[-1:])
    if not last_turn.strip():
        yield "empty prompt", '"prompt" is empty'
    if kind == "ranking":
        _, score_field, _ = fields
        if len(answers) < 2:
            yield "fewer than two responses", "a ranking needs at least two responses"
        for field in (score_field, "systems"):
            if field in row and len(row[field]) != len(answers):
                yield ("different lengths",
                       f'"{field}" has length {len(row[field])} for {len(answers)} responses')
        for i, score in enumerate(row[score_field]):
            if not abs(score) <= sys.float_info.max:  # also true for NaN and for an integer beyond any float
                yield "score not finite", f'"{score_field}[{i}]" is not finite'
            elif abs(score) > LARGEST_SCORE:
                yield "score too large", f'"{score_field}[{i}]" is beyond {LARGEST_SCORE:g}'
    for field, (own_prompt, response) in answers.items():
        if own_prompt not in (None, prompt):
            origin = "prompt" if "prompt" in row else "chosen"
            yield "no shared prompt", f'"{field}" does not share the prompt of "{origin}"'
        if not response.strip():
            yield "empty response", f'"{field}" is empty'
        inside = [token for token in special if token in response]
        if inside:
            yield "special token", f'"{field}" has the special token {inside[0]!r} in its text'
        if own_prompt is not None and HH_HUMAN in response:
            yield "last turn is the human's", f'"{field}" does not end with an Assistant turn'
    if (isinstance(prompt, str) and len(prompt) >= 10 and answers
            and all(response.startswith(prompt) for _, response in answers.values())):
        yield "prompt repeated", f'"{field}" begins with the whole prompt: leave it out of the answers'
    if kind == "pair" and answers["chosen"][1] == answers["rejected"][1]:
        yield "equal responses", '"chosen" and "rejected" are equal'


def render(where: str, prompt: str | list[dict], tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    require(getattr(tokenizer, "chat_template", None), where, "a chat needs a tokenizer with a chat template")
    try:
        return render_chat(tokenizer, prompt)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_types(where: str, row: dict, kind: str, fields: list[str]):
    if kind == "ranking":
        response_field, score_field, _ = fields
        for field in (response_field, score_field, "systems"):
            require(isinstance(row.get(field, []), list), where, f'"{field}" is not a list')
        for i, score in enumerate(row[score_field]):
            require(type(score) in (int, float), where, f'"{score_field}[{i}]" is not a number')
        for i, system in enumerate(row.get("systems", [])):
            require(isinstance(system, str), where, f'"systems[{i}]" is not a string')
    if kind == "demonstration":
        require(isinstance(row.get("attributes", {}), dict), where, '"attributes" is not an object')
        for name, level in row.get("attributes", {}).items():
            share = type(level) is float and 0 <= level <= 1         # OpenAssistant: the level is round(9 x)
            require(type(level) is int or share, where,
                    f'"attributes" has "{name}", which is neither an integer nor a share from 0.0 to 1.0')
            require(re.fullmatch(r"[\w-]+", name), where,
                    f'"attributes" has "{name}": names are of letters, digits, - and _')


def parse_row(where: str, row: dict, kind: str, fields: list[str], tokenizer=None, chat: bool = False,
              special=()) -> tuple:
    """(example, key to split by, None), or (None, None, fault). A pair becomes a ranking of two."""
    check_types(where, row, kind, fields)
    values = {field: row[field] for field in fields if field != "prompt"}
    if kind == "ranking":
        values = {f"{fields[0]}[{i}]": response for i, response in enumerate(row[fields[0]])}
    values = {field: read_text(where, field, value) for field, value in values.items()}
    answers = {field: split_answer(where, field, value, "prompt" in row) for field, value in values.items()}
    answers = {field: (before, without_end(special, text)) for field, (before, text) in answers.items()}
    prompt = read_text(where, "prompt", row["prompt"]) if "prompt" in row else answers["chosen"][0]
    require(prompt is not None, where, f'missing "prompt"; {KNOWN}')
    chat = chat or any(isinstance(value, list) for value in values.values())
    if chat and "prompt" in row and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]

    fault = next(find_faults(row, kind, fields, prompt, answers, special), None)
    if fault:
        return None, None, fault
    key, prompt = text_of(prompt), render(where, prompt, tokenizer)
    responses = [response for _, response in answers.values()]
    if kind == "pair":
        return Ranking(prompt, responses, [1.0, 0.0]), key, None
    if kind == "ranking":
        scores = [float(score) for score in row[fields[1]]]
        return Ranking(prompt, responses, scores, row.get("systems", [])), key, None
    if kind == "demonstration":
        levels = {name: level if type(level) is int else round(9 * level)
                  for name, level in row.get("attributes", {}).items()}
        return Demonstration(prompt, responses[0], levels), key, None
    return prompt, key, None


def choose_test_prompts(keys: dict[str, str]) -> set[str]:
    """About a tenth of the prompts; each split gets at least one.

    A prompt is chosen by a hash of its own key, so the order of the file, its labels and its other rows have
    no influence.
    """
    digests = {prompt: hashlib.sha256(key.encode()).hexdigest() for prompt, key in keys.items()}
    below = sum(int(digest, 16) < TEST_SHARE * 2**256 for digest in digests.values())
    by_digest = sorted(digests, key=lambda prompt: (digests[prompt], prompt))
    return set(by_digest[:min(max(below, 1), len(keys) - 1)])


def pairs_of(ranking: Ranking) -> list[Pair]:
    """Every two responses that differ in text and score, as in InstructGPT (Ouyang et al., 2022, 3.5)."""
    scored = list(zip(ranking.scores, ranking.responses))
    return [Pair(ranking.prompt, a, b) if high > low else Pair(ranking.prompt, b, a)
            for (high, a), (low, b) in combinations(scored, 2) if high != low and a != b]


def best_of(ranking: Ranking) -> Demonstration:
    return Demonstration(ranking.prompt, ranking.responses[ranking.scores.index(max(ranking.scores))])


def rated(rankings: list[Ranking]) -> list[Demonstration]:
    """Every response with two attributes, score and length in words, as levels 0 to 9.

    The level is the number of whole tenths of all responses that have a lower value.
    """
    rows = [(ranking.prompt, text, {"score": score, "length": len(words(text))})
            for ranking in rankings for text, score in zip(ranking.responses, ranking.scores)]
    ordered = {name: sorted(values[name] for _, _, values in rows) for name in ("score", "length")}
    return [Demonstration(prompt, text, {name: 10 * bisect_left(ordered[name], value) // len(rows)
                                         for name, value in values.items()})
            for prompt, text, values in rows]


def prompt_of(example) -> str:
    return example if isinstance(example, str) else example.prompt


def build_task(name: str, kind: str, examples: list, test_prompts: set[str]) -> Task:
    rows = {"train": [example for example in examples if prompt_of(example) not in test_prompts],
            "test": [example for example in examples if prompt_of(example) in test_prompts]}
    task = Task(name, {split: list(dict.fromkeys(map(prompt_of, rows[split]))) for split in rows})
    task.chat = any(isinstance(prompt_of(example), Prompt) for example in examples)
    if kind in ("pair", "ranking"):
        task.rankings = rows
        task.pairs = {split: [pair for ranking in rows[split] for pair in pairs_of(ranking)]
                      for split in rows}
        task.demonstrations = {split: [best_of(ranking) for ranking in rows[split]] for split in rows}
        task.ratings = {split: rated(rows[split]) for split in rows}
    if kind == "demonstration":
        task.demonstrations = rows
        task.ratings = {split: [row for row in rows[split] if row.attributes] for split in rows}
    return task


def use_for_test(task: Task, other: Task):
    """Train on all rows of the task whose prompt is not in `other`, and test on all rows of that."""
    require(task.chat == other.chat, other.name, "prompts are conversations in the one file and plain in the "
            "other: write both in one form, or give --chat True")
    test = {prompt for prompts in other.prompts.values() for prompt in prompts}
    task.files += other.files
    for name in ("prompts", "pairs", "rankings", "demonstrations", "ratings"):
        own, rows = (sum(getattr(t, name).values(), []) for t in (task, other))
        own = [row for row in own if (row if name == "prompts" else row.prompt) not in test]
        setattr(task, name, {"train": own, "test": rows})
    if any(task.rankings.values()):                               # levels are ranks among a split's rows
        task.ratings = {split: rated(rows) for split, rows in task.rankings.items()}
    if not task.prompts["train"]:
        raise UserError(f"{task.name}: every prompt is in the test data too, so none is left to train on")


def load(source: str, tokenizer=None, limit: int = 0, chat: bool = False,
         skip_bad_rows: bool = False, columns: str = "") -> Task:
    """The task in a file or hub data set.

    limit: read only the first so many usable rows (0: all). chat: plain prompts become a user's turn.
    columns: "our_name=their_name,..." renames fields. skip_bad_rows: leave out and count what one row can
    have wrong.
    """
    path, name = locate(source)
    examples, keys, left_out, unused, file_kind = [], {}, Counter(), {}, None
    special = special_tokens(tokenizer)

    def read(where, parse):
        try:
            row = shapes.canonical(shapes.renamed(parse(), columns))
        except UserError as error:
            raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: a field has a value that it cannot have ({error})") from error
        kind, fields = fields_of(where, row)
        require(kind == (file_kind or kind), where,
                f"this row is a {kind}, the rows before it are {file_kind}s")
        unused.update(dict.fromkeys(unused_fields(where, row, kind)))
        example, key, fault = parse_row(where, row, kind, fields, tokenizer, chat, special)
        require(not fault or skip_bad_rows, where,
                f"{fault and fault[1]}; --skip_bad_rows leaves such rows out")
        return kind, example, key, fault

    for where, parse in read_rows(path):
        try:
            kind, example, key, fault = read(where, parse)
        except UserError as error:
            if not skip_bad_rows and examples and "--skip_bad_rows" not in str(error):
                raise UserError(f"{error}; --skip_bad_rows leaves such rows out") from error
            if not skip_bad_rows:
                raise
            fault = (str(error).removeprefix(f"{where}: "), "")
        if fault:
            left_out[fault[0]] += 1
            continue
        file_kind = kind
        examples.append(example)
        # The key is the prompt before the chat template. Templates differ between models and may print
        # today's date; the split must not depend on that. Two keys may give one prompt: the smaller key
        # decides, so that the prompt is in one split only.
        keys[prompt_of(example)] = min(key, keys.get(prompt_of(example), key))
        if len(examples) == limit:
            break
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        total = len(examples) + left_out.total()
        print(f"left out {left_out.total()} of {total} rows: {reasons}".translate(CONTROL), file=sys.stderr)
    if not examples:
        raise UserError(f"{path.name}: no usable row")
    if unused:
        warn(f"{path.name}: fields that are not used: {', '.join(unused)}")
    if len(keys) < 2:
        raise UserError(f"{path.name}: all rows have the same prompt; at least two different prompts are "
                        "needed, one to train on and one to test on")
    return replace(build_task(name, file_kind, examples, choose_test_prompts(keys)), files=(path,))
