"""Conversations as text: each reader renders them by its own tokenizer's chat template.

A finished answer has to stand in training as the template writes it: after the generation prompt, and before
the token that ends an assistant's turn. That token need not be tokenizer.eos_token (Gemma, Phi-3, Llama 3).
"""
from jinja2 import TemplateError

from common import UserError, warn

REFUSED = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
QUESTION, ANSWER = {"role": "user", "content": "Hi"}, "Yes"           # a conversation to try a template with


class Prompt(str):
    """A prompt as the policy reads it. `messages` is the conversation, for readers with another template."""
    messages = ()

    def __new__(cls, text, messages=()):
        prompt = super().__new__(cls, text)
        prompt.messages = tuple(messages)
        return prompt

    def __getnewargs__(self):
        return str(self), self.messages

    def __add__(self, tags):
        return Prompt(str(self) + tags, self.messages)


def apply(tokenizer, messages, **how):
    """The conversation as text. Answers have no thinking: templates that can leave it out (Qwen 3) do so."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, enable_thinking=False, **how)


def render(tokenizer, messages):
    """The Prompt of a conversation: up to where the answer begins, or goes on, if it ends with a part of it.

    Raises UserError where the template refuses the conversation.
    """
    try:
        if messages[-1]["role"] == "assistant":
            return Prompt(apply(tokenizer, messages, continue_final_message=True), messages)
        return Prompt(apply(tokenizer, messages, add_generation_prompt=True) + header(tokenizer), messages)
    except REFUSED as error:
        raise UserError(f'the chat template refuses "prompt" ({error})') from error


def header(tokenizer):
    """What the template writes between a user's turn and the answer, if its generation prompt lacks it."""
    if not hasattr(tokenizer, "header"):
        before, after = (apply(tokenizer, [QUESTION], add_generation_prompt=asked) for asked in (False, True))
        whole, tokenizer.header = finished_turn(tokenizer), ""
        if before == after and whole.startswith(before) and ANSWER in whole[len(before):]:
            tokenizer.header = whole[len(before):whole.rindex(ANSWER)].lstrip(" ")
        if tokenizer.header:
            warn("the chat template has no generation prompt: prompts end here with what it writes before "
                 f"an answer, {tokenizer.header!r}")
    return tokenizer.header


def finished_turn(tokenizer):
    """A question and its answer, as the template writes them; "" where it takes no such conversation."""
    try:
        return apply(tokenizer, [QUESTION, {"role": "assistant", "content": ANSWER}])
    except REFUSED:
        return ""


def end_turns(tokenizer):
    """Make the token that ends an assistant's turn in the template the tokenizer's EOS, in this run.

    Warns where the template has no such token, and where a finished turn is not what this run trains on:
    generation prompt, answer, end of turn.
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    whole = finished_turn(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ends = [i for i in ids(whole[whole.rfind(ANSWER) + len(ANSWER):]) if i in special]
    if not ends:
        return warn("the chat template ends an assistant's turn without a special token: answers end with "
                    f"{tokenizer.eos_token!r} here")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    prompt = render(tokenizer, [QUESTION])
    ours = [*ids(prompt), *ids(ANSWER), ends[0]]
    if ids(whole)[:len(ours)] != ours:
        warn(f"the chat template writes a finished turn as {whole!r}, but prompt, answer and end of turn are "
             f"{prompt + ANSWER + tokenizer.eos_token!r} here: answers are trained in a form that the model "
             "may not know")


def as_read_by(tokenizer, prompts):
    """The prompts in the form that another model's tokenizer reads: conversations by its own template.

    Without a template it reads what was said, one message a line.
    """
    def text(prompt):
        messages = getattr(prompt, "messages", ())
        if not messages:
            return prompt
        if tokenizer.chat_template:
            return render(tokenizer, messages)
        return "".join(f"{message['content']}\n" for message in messages)

    return [text(prompt) for prompt in prompts]
