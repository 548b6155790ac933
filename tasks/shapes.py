"""Rows as public data sets have them, in the form that preferences.py reads. Nothing here is guessed.

    system            its text becomes the first message                     Orca pairs, and many others
    question, query, instruction (+ input)       the prompt, where there is none     Orca, RRHF, Alpaca
    conversations, {"from", "value"} turns       messages                    ShareGPT
    messages          all but the last one are the prompt, the last one is the completion
    response_0, response_1, better_response_id   chosen and rejected         PKU-SafeRLHF
    answers of {"answer", "rank", "model"}       responses, scores = -rank   Nectar
    completions of {"response", "overall_score"} responses and scores        UltraFeedback
    helpfulness, correctness, ... or quality, toxicity, ...    attributes    HelpSteer, OpenAssistant
"""
from common import UserError

ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
         "chatgpt": "assistant", "system": "system"}
OURS = {"prompt", "chosen", "rejected", "responses", "completions", "completion", "response", "scores",
        "rewards"}                          # null is a fault in them; in other columns there is no value then
RATINGS = {"helpfulness", "correctness", "coherence", "complexity", "verbosity",           # HelpSteer
           "quality", "toxicity", "humor", "creativity", "violence"}                       # OpenAssistant
# Other fields of these names say something that is not trained on: an answer, a label, a part of the prompt.
MEANINGFUL = {"system", "input", "context", "history", "instruction", "question", "query", "tools", "images",
              "documents", "conversations", "conversation", "answer", "answers", "output", "outputs", "label",
              "response", "completion", "responses", "completions", "better_response_id", "prefix", "suffix",
              "chosen", "rejected", "winner", "preference"}


def message_of(value):
    """{"from", "value"} or {"role", "content"}, its content perhaps in parts of text, as a message."""
    if isinstance(value, dict) and "from" in value and "value" in value:
        value = {"role": ROLES.get(value["from"], value["from"]), "content": value["value"]}
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        parts = value["content"]
        if all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
               for part in parts):
            value = value | {"content": "".join(part["text"] for part in parts)}
    return value


def messages_of(value):
    """Lists of messages, or one message, with message_of; anything else as it is."""
    if isinstance(value, dict) and ("from" in value or "role" in value):
        value = [value]
    return [message_of(entry) for entry in value] if isinstance(value, list) else value


def renamed(row, columns):
    """--columns "prompt=question,chosen=answer_a": the row with our names for its fields."""
    parts = [part.partition("=") for part in columns.split(",")] if columns else []
    names = {ours.strip(): theirs.strip() for ours, _, theirs in parts}
    for ours, theirs in names.items():
        if not ours or theirs not in row:
            raise UserError(f'--columns {columns}: no field {theirs!r}; write "prompt=question" with any of '
                            f"{', '.join(row)}")
    others = {name: value for name, value in row.items() if name not in {*names, *names.values()}}
    return others | {ours: row[theirs] for ours, theirs in names.items()}


def canonical(row):
    """The row in our form; unchanged where it has none of the shapes above."""
    row = {name: value for name, value in row.items() if value is not None or name in OURS}
    for name in ("prompt", "chosen", "rejected", "completion", "conversations", "messages"):
        if name in row:
            row[name] = messages_of(row[name])
    if "conversations" in row and "prompt" not in row:
        turns = row.pop("conversations")
        row["prompt" if "chosen" in row else "messages"] = turns
    if "messages" in row and not {"prompt", "chosen"} & row.keys() and isinstance(row["messages"], list):
        *before, last = row.pop("messages")
        row |= {"prompt": before, "completion": [last]}
    for name in ("question", "query", "instruction"):
        if name in row and not {"prompt"} & row.keys():
            row["prompt"] = row.pop(name)
            more = row.pop("input", "") if name == "instruction" else ""
            if more:
                row["prompt"] += f"\n\n{more}"
            if name == "instruction" and "output" in row:
                row["completion"] = row.pop("output")
    if {"response_0", "response_1", "better_response_id"} <= row.keys() and "prompt" in row:
        better = row.pop("better_response_id")
        if better not in (0, 1):
            raise UserError(f'"better_response_id" is {better!r}, not 0 or 1')
        both = [row.pop("response_0"), row.pop("response_1")]
        row |= {"chosen": both[better], "rejected": both[1 - better]}
    for field, text, score, sign in (("answers", "answer", "rank", -1), ("completions", "response",
                                                                         "overall_score", 1)):
        found = row.get(field)
        if isinstance(found, list) and found and all(isinstance(entry, dict) and {text, score} <= entry.keys()
                                                     for entry in found):
            del row[field]
            row |= {"responses": [entry[text] for entry in found],
                    "scores": [sign * entry[score] for entry in found]}
            if all("model" in entry for entry in found):
                row["systems"] = [entry["model"] for entry in found]
    ratings = {name: row[name] for name in row if name in RATINGS}
    if {"response", "completion"} & row.keys() and "attributes" not in row and ratings:
        row = {name: value for name, value in row.items() if name not in ratings} | {"attributes": ratings}
    return with_system(row)


def with_system(row):
    """A system column becomes the first message; a prompt that also stands in the transcripts is left out."""
    system = row.pop("system", None)
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if system:
        if not isinstance(prompt, (str, list)):
            raise UserError('"system" beside no "prompt": put it into the messages')
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        row["prompt"] = [{"role": "system", "content": system}, *messages]
    elif isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1:
        asked = [m for m in chosen[:-1] if isinstance(m, dict) and m.get("role") == "user"]
        if asked and asked[-1].get("content") == prompt:
            del row["prompt"]
    return row
