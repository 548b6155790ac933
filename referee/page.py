"""report.html of an evening (mine.py): one file that needs no other, no network and no script."""
import html
import textwrap

import harness
from referee.advice import FEWEST, MODEL, RULE, TOO_FEW, Evening
from referee.tables import text_table

NAME = "report.html"
SHOWN = 40                                                              # prompts whose answers are shown
STYLE = """
body { font: 18px/1.5 sans-serif; color: #111; background: #fff; margin: 2em auto; max-width: 100em;
       padding: 0 1em }
h1 { font-size: 1.7em } h2 { font-size: 1.3em; margin-top: 2em }
.advice { border-left: .4em solid #06c; background: #eef4fb; padding: .6em 1em }
.wide { overflow-x: auto }
table { border-collapse: collapse } th, td { border: 1px solid #999; padding: .3em .6em; text-align: left }
th { background: #eee }
.row { display: grid; gap: .6em; grid-template-columns: repeat(auto-fit, minmax(16em, 1fr));
       margin-bottom: 1.2em }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.prompt { background: #eee; padding: .5em; margin-top: 1.5em; max-height: 14em; overflow-y: auto;
          display: flex; flex-direction: column-reverse }    /* a long one is scrolled to its end */
.answer { border: 1px solid #999; padding: .5em }
.name { font-weight: bold; border-bottom: 1px solid #ccc; margin-bottom: .4em }
"""
MEANINGS = (
    "In brackets and after ±: 95% intervals over held-out prompts. Those of all win rates hold together.",
    "Reward: the mean score of the answers, as the reward gives it.",
    "KL: how far the method's distribution of answers is from your model's.",
    "Ended by itself: the share of answers that were not cut off at --max_new_tokens.",
    "Held-out pairs told apart: the method's own measure, before and after training, with an interval over "
    "pairs, as if they were independent. Measures of two methods are not the same quantity: do not compare "
    "them.",
    "Minutes: training and evaluation of this method, without its trial.")


def safe(text):
    """A text as HTML shows it, control characters spelled out."""
    return html.escape(str(text).translate(harness.CONTROL))


def table(rows):
    head, *body = [[safe(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
              for row in body]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def paragraphs(sentences):
    return "\n".join(f"<p>{safe(sentence)}</p>" for sentence in sentences)


def answers(evening):
    """[(spread, prompt, [(name, answer, score)])]: the first answers to each prompt, largest spread first.

    White space at both ends of the texts is left out.
    """
    found = []
    for i in range(0, evening.prompts * evening.n, evening.n):
        row = [(name, run["samples"]["responses"][i].strip(), evening.scores[name][i])
               for name, run in evening.all.items()]
        spread = max(abs(score - row[0][2]) for _, _, score in row)
        found.append((spread, evening.all[MODEL]["samples"]["prompts"][i].strip(), row))
    return sorted(found, key=lambda entry: -entry[0])


def side_by_side(evening):
    parts = []
    for _, prompt, row in answers(evening)[:SHOWN]:
        cells = [f'<div class="answer"><div class="name">{safe(name)}: {score:.3g}</div>'
                 f'<div class="text" dir="auto">{safe(text)}</div></div>' for name, text, score in row]
        parts.append(f'<div class="prompt text" dir="auto">{safe(prompt)}</div>\n'
                     f'<div class="row">{"".join(cells)}</div>')
    return "\n".join(parts)


def page(evening, config, failed):
    """The whole report as HTML."""
    title = f"{', '.join(evening.names)} on {config.policy or config.model}"
    reward = config.reward or "a reward model, trained from your training pairs"
    facts = [f"Data: {config.data}; {evening.state['train']} prompts to train on, {evening.prompts} held-out "
             f"prompts with {evening.n} answers each. Reward: {reward}. Seed {config.seed}, one run of each "
             f"method, {config.minutes:g} minutes in all."]
    shown = min(SHOWN, evening.prompts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{safe(title)}</title>
<style>{STYLE}</style></head>
<body>
<h1>{safe(title)}</h1>
{paragraphs(facts + left_out(failed))}
<div class="advice">
{paragraphs(evening.recommendation())}
</div>
{paragraphs([RULE])}
<h2>Measured on held-out prompts</h2>
{table(evening.table())}
{paragraphs(MEANINGS)}
<h2>Differences, paired within a prompt</h2>
<p>"{TOO_FEW}": the interval holds 0, or there are fewer than {FEWEST} prompts. All intervals hold together
with 95%.</p>
{table(evening.differences())}
<h2>Answers side by side</h2>
<p>One answer of each to {shown} of {evening.prompts} prompts, with its score. The prompts with the largest
differences come first, so the first ones are not typical.</p>
{side_by_side(evening)}
</body>
</html>
"""


def left_out(failed):
    """Sentences on methods that have no result, {name: what was wrong}."""
    return [f"{name} is left out: {text}" for name, text in failed.items()]


def write(out, state, runs, config, failed={}):
    """Write report.html into `out`; returns what the screen shows of it."""
    evening = Evening(state, runs)
    (out / NAME).write_text(page(evening, config, failed), encoding="utf-8", errors="backslashreplace")
    return "\n\n".join(["", text_table(evening.table()), text_table(evening.differences()),
                        *(textwrap.fill(sentence, 110) for sentence in [
                            *left_out(failed), *evening.recommendation()]),
                        f"answers side by side: {out / NAME}"])
