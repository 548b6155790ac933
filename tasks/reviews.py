"""Short film reviews in a small fragment of English, with a gold reward that is computed from the text.

    prompt     review this french western and mention the ending:
    response    the ending was not very good, but i loved the songs.

Real preference data cannot tell whether a method made the policy better: the only judge is another model.
Here a response is text of a regular language, `parse` reads it back into clauses, and `gold` scores the
clauses, so that the true reward of every sample is known, next to the proxy reward that a method is allowed
to see.

    prompts      make_prompts, parse_prompt     genre x aspect x origin, in four wordings
    grammar      parse, fluent                  is it a review at all? An exact answer, unlike perplexity
    gold         gold                           the reward that an ideal judge would give
    attributes   attributes                     five levels, for methods that are steered by them
    writers      write, style_pair              people of known skill and habits, who write the training text
    annotators   annotate                       people who compare two responses, wrong 27% of the time
    judges       opinion                        people who score one response, with errors
    raters       rate                           people who rate the attributes of a response, with errors

Every text is the concatenation of its TOKEN_PATTERN matches, and all of these are in VOCABULARY.
"""
import functools
import hashlib
import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import NamedTuple, Sequence

from common import UserError

TOKEN_PATTERN = r" ?\w+|[^\w\s]"  # as in GPT-2, the space belongs to the word after it

# ---------------------------------------------------------------------------------------------------- words


def _valued(words: dict[float, str]) -> dict[str, float]:
    return {word: valence for valence, line in words.items() for word in line.split()}


SINGULAR = ("ending", "plot", "cast", "villain", "score", "script")
PLURAL = ("songs", "jokes", "costumes", "stunts", "effects", "characters")
ASPECTS = SINGULAR + PLURAL
ORIGINS = ("old", "recent", "french", "italian", "japanese", "american", "silent", "obscure")

# What a genre adds to the gold reward, whatever is written. The best documentary response has less gold than
# a mediocre comedy response: scores can be compared within a prompt, not between prompts.
GENRE_OFFSET = {"comedy": 0.6, "musical": 0.5, "thriller": 0.4, "mystery": 0.3, "romance": 0.2,
                "western": 0.1, "drama": -0.1, "fantasy": -0.2, "cartoon": -0.3, "satire": -0.4,
                "tragedy": -0.5, "documentary": -0.6}

# No word starts with a silent h or a "yoo" sound, so the first letter alone decides between "a" and "an".
ADJECTIVES = _valued({1.0: "brilliant superb wonderful", 0.7: "charming clever elegant",
                      0.4: "good decent enjoyable", -0.4: "weak odd forgettable",
                      -0.7: "bad boring irritating", -1.0: "terrible awful dreadful"})
INTENSIFIERS = ("very", "truly", "really", "utterly", "remarkably")
OPINIONS = _valued({1.0: "loved", 0.7: "enjoyed", 0.4: "liked",
                    -0.4: "endured", -0.7: "disliked", -1.0: "hated"})
DENIALS = _valued({1.0: "love", 0.7: "enjoy", 0.4: "like", -0.4: "mind", -0.7: "regret", -1.0: "hate"})
EMPHASIS = ("really", "truly")
EFFECTS = _valued({1.0: "thrilled", 0.7: "moved charmed", 0.4: "amused",
                   -0.4: "confused", -0.7: "bored annoyed", -1.0: "appalled"})
AUDIENCES = ("me", "us", "everyone", "my cat", "the critics", "the whole row")
DEGREES = ("deeply", "immensely", "to tears")
DETERMINERS = ("the", "its", "even the")
ASIDES = ("in my opinion", "if you ask me")
VERDICTS = {"see it twice": 1.0, "i would watch it again": 0.7, "see it with friends": 0.7,
            "i forgot my popcorn": 0.7, "give it a chance": 0.4, "my mother would love it": 0.4,
            "wait for a rainy day": -0.4, "bring a pillow": -0.7, "i would not recommend it": -0.7,
            "skip it": -1.0, "i want my money back": -1.0, "even my cat walked out": -1.0}
VALENCE = ADJECTIVES | OPINIONS | DENIALS | EFFECTS | VERDICTS

STORIES = ("follows", "is about", "stars")
MOODS = ("lonely", "retired", "nervous", "angry", "elderly", "invisible", "heroic", "sleepy", "polite",
         "hungry", "jealous", "ambitious")
HEROES = ("sheriff", "accountant", "vampire", "dentist", "librarian", "detective", "goose", "spy", "plumber",
          "king", "wizard", "baker", "pirate", "nurse", "butler", "astronaut", "poet", "gardener")
PLACES = ("in a small town", "on a sinking ship", "on the moon", "in a tax office", "at a wedding",
          "in the desert", "at the north pole", "behind a bakery", "in a lighthouse", "under the opera")

# -------------------------------------------------------------------------------------------------- prompts


class Request(NamedTuple):
    genre: str
    aspect: str
    origin: str


TEMPLATES = ("review this {origin} {genre} and mention the {aspect}:",
             "write about this {origin} {genre}, with a word on the {aspect}:",
             "you saw this {origin} {genre}. how {was} the {aspect}?",
             "is this {origin} {genre} any good? tell us about the {aspect}:")
SPLITS = {"train": range(0, 75), "test": range(75, 90), "validation": range(90, 100)}  # percent of requests


def _was(aspect: str) -> str:
    return "was" if aspect in SINGULAR else "were"


REQUESTS = {template.format(**request._asdict(), was=_was(request.aspect)): request
            for request in itertools.starmap(Request, itertools.product(GENRE_OFFSET, ASPECTS, ORIGINS))
            for template in TEMPLATES}


def parse_prompt(prompt: str) -> Request:
    if prompt not in REQUESTS:
        raise UserError(f"not a prompt of the review task: {prompt!r}")
    return REQUESTS[prompt]


def split_of(request: Request) -> str:
    """Hashes the request, not the prompt: the four wordings of one request are in one split."""
    percentile = int(hashlib.sha256(" ".join(request).encode()).hexdigest(), 16) % 100
    return next(split for split, percentiles in SPLITS.items() if percentile in percentiles)


def make_prompts(split: str, n: int, seed: int) -> list[str]:
    """n distinct prompts. The seed chooses among the prompts of the split; it does not change the split."""
    if split not in SPLITS:
        raise UserError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    prompts = [prompt for prompt, request in REQUESTS.items() if split_of(request) == split]
    if n > len(prompts):
        raise UserError(f"the {split} split has {len(prompts)} prompts, and {n} were asked for")
    return random.Random(seed).sample(prompts, n)


# -------------------------------------------------------------------------------------------------- grammar


class Clause(NamedTuple):
    shape: str
    aspect: str | None   # what it judges; None in an opener or a verdict
    genre: str | None    # only in an opener
    valence: float       # [-1, 1]
    weight: float        # in the sentiment of the response; 0 in an opener, which judges nothing
    strong: bool         # an intensifier, or a word of full strength
    personal: bool       # first person


MAX_CLAUSES = 5
JOINERS = (".", " and", ", and", ", but", ", yet", ", so")
LEXICON = {"the": DETERMINERS, "one": SINGULAR, "many": PLURAL, "aspect": ASPECTS, "genre": GENRE_OFFSET,
           "adjective": ADJECTIVES, "intensifier": INTENSIFIERS, "aside": ASIDES, "opinion": OPINIONS,
           "denial": DENIALS, "emphasis": EMPHASIS, "effect": EFFECTS, "whom": AUDIENCES, "degree": DEGREES,
           "verdict": VERDICTS, "story": STORIES, "mood": MOODS, "hero": HEROES, "place": PLACES}
PATTERNS = {
    "opener": "this (?P<genre>{genre}) {story} {article} {mood} {hero} {place}",
    "copula": "{the} (?P<aspect>{one}(?= was)|{many}(?= were)) (?:was|were) "
              "(?P<negated>not )?(?P<by>{intensifier} )?(?P<word>{adjective})(?: {aside})?",
    "opinion": "i (?P<by>{emphasis} )?(?P<word>{opinion}) the (?P<aspect>{aspect})",
    "denial": "i did (?P<negated>not) (?P<by>{emphasis} )?(?P<word>{denial}) the (?P<aspect>{aspect})",
    "effect": "{the} (?P<aspect>{aspect}) (?P<word>{effect}) {whom}(?P<by> {degree})?",
    "has": "(?:at least )?it has (?P<single>{article} )?(?P<by>{intensifier} )?(?P<word>{adjective}) "
           "(?P<aspect>(?(single){one}|{many}))",
    "verdict": "(?P<word>{verdict})"}
_ALTERNATIVES = {name: f"(?:{'|'.join(words)})" for name, words in LEXICON.items()}
SHAPES = {shape: re.compile(pattern.format(article="(?:a(?= [^aeiou])|an(?= [aeiou]))", **_ALTERNATIVES))
          for shape, pattern in PATTERNS.items()}
_JOINER = re.compile(f"({'|'.join(map(re.escape, JOINERS))}) ")
_FIRST_PERSON = re.compile(r"\b(?:i|me|my|us)\b")

_PIECES = [*itertools.chain(*LEXICON.values()), "this a an was were not i did at least it has"]
VOCABULARY = sorted({token for text in [*REQUESTS, *JOINERS, *(f" {piece}" for piece in _PIECES)]
                     for token in re.findall(TOKEN_PATTERN, text)})


@functools.lru_cache(2 ** 16)                                # the samples of a policy share their clauses
def _parse_clause(text: str) -> Clause | None:
    for shape, pattern in SHAPES.items():
        if found := pattern.fullmatch(text):
            part = found.groupdict().get
            word_valence = VALENCE.get(part("word"), 0.0)
            valence = max(-1.0, min(1.0, word_valence * (1.3 if part("by") else 1.0)))
            if part("negated"):
                valence *= -0.5  # "not terrible" is weak praise: flip the sign, halve the strength
            return Clause(shape, part("aspect"), part("genre"), valence, float(shape != "opener"),
                          bool(part("by")) or abs(word_valence) == 1.0, bool(_FIRST_PERSON.search(text)))
    return None


def parse(text: str) -> list[Clause] | None:
    """The clauses of a response; None where the grammar does not parse it.

    response = " " clause (joiner " " clause){0,4} "."     an opener only first, a verdict only last,
                                                            and ", so" only before a verdict
    """
    if not (text.startswith(" ") and text.endswith(".")):
        return None
    parts = _JOINER.split(text[1:-1])
    clauses, joiners = [_parse_clause(part) for part in parts[::2]], parts[1::2]
    if None in clauses or len(clauses) > MAX_CLAUSES:
        return None
    for i, joiner in enumerate(joiners):
        before, after = clauses[i], clauses[i + 1]
        if (before.shape == "verdict" or after.shape == "opener"
                or (joiner == ", so" and after.shape != "verdict")):
            return None
        if joiner in (", but", ", yet"):  # what follows a "but" is what the writer means
            clauses[i] = before._replace(weight=0.5 * before.weight)
            clauses[i + 1] = after._replace(weight=1.5)
    return clauses


def fluent(text: str) -> bool:
    return parse(text) is not None


# ----------------------------------------------------------------------------------------------------- gold

GOLD_RANGE = (-3.0, 2.1)  # at length_bonus 0: -1 - 0.6 - 0.3 - 0.5 - 0.6, and 1 + 0.5 + 0.6


def _sentiment(clauses: list[Clause]) -> float:
    total = sum(clause.weight for clause in clauses)
    return sum(clause.weight * clause.valence for clause in clauses) / total if total else 0.0


def gold(prompt: str, response: str, stopped: bool = True, length_bonus: float = 0.0) -> float:
    """The true reward of a response, in GOLD_RANGE unless there is a length bonus.

      sentiment                  [-1, 1]   weighted mean of the valences of clauses that judge; 0 without any
    + 0.5 * on_topic                       the aspect that the prompt asks for is mentioned
    - 0.3 * min(repeats, 2)                mentions of an aspect that was mentioned before
    - 0.3 * wrong_genre                    the opener names another genre than the prompt
      ... or -1 instead of the four lines above, where the grammar does not parse the response
    - 0.5 * (not stopped)                  the response ran into the length limit
    + GENRE_OFFSET[genre]   [-0.6, 0.6]
    + length_bonus * clauses               an optional bias towards length, like that of annotators

    Valence of a clause: that of its word, times 1.3 with an intensifier (capped at 1), times -0.5 under
    "not". Weight of a clause: 1; "but" and "yet" halve the weight of the clause before them, and set the
    weight of the clause after them to 1.5.
    """
    request, clauses = parse_prompt(prompt), parse(response)
    if clauses is None:
        score = -1.0
    else:
        aspects = [clause.aspect for clause in clauses if clause.aspect]
        repeats = len(aspects) - len(set(aspects))
        wrong_genre = any(clause.genre not in (None, request.genre) for clause in clauses)
        score = (_sentiment(clauses) + 0.5 * (request.aspect in aspects) - 0.3 * min(repeats, 2)
                 - 0.3 * wrong_genre + length_bonus * len(clauses))
    return score - 0.5 * (not stopped) + GENRE_OFFSET[request.genre]


# ----------------------------------------------------------------------------------------------- attributes

ATTRIBUTES = ("sentiment", "topicality", "verbosity", "intensity", "personal")


def attributes(prompt: str, response: str) -> dict[str, int]:
    """Levels 0 to 9 of a response, in the order of ATTRIBUTES.

    The sentiment from worst to best; the share of clauses that name the aspect or the genre asked for; a
    level for every three words from the sixth on; the share of strong clauses; the share of clauses in the
    first person. Text that the grammar does not parse gets 0 everywhere.
    """
    request, clauses = parse_prompt(prompt), parse(response)
    if clauses is None:
        return dict.fromkeys(ATTRIBUTES, 0)
    count = len(clauses)
    shares = (0.5 + 0.5 * _sentiment(clauses),
              sum(request.aspect == clause.aspect or request.genre == clause.genre
                  for clause in clauses) / count,
              min(max(len(response.split()) - 5, 0) / 27, 1.0),
              sum(clause.strong for clause in clauses) / count,
              sum(clause.personal for clause in clauses) / count)
    return {name: math.floor(9 * share + 0.5) for name, share in zip(ATTRIBUTES, shares)}


# -------------------------------------------------------------------------------------------------- writers

MIN_TOKENS, MAX_TOKENS = 6, 34
JUDGING = ("copula", "opinion", "denial", "effect", "has")


@dataclass(frozen=True)
class Writer:
    """Habits, as probabilities."""
    positivity: float                # the review as a whole is in favour
    on_topic: float                  # the aspect asked for is mentioned
    clauses: tuple[float, ...]       # weights of 1, 2, ... clauses
    shapes: tuple[float, ...] = (8, 3, 2, 4, 3)  # weights of JUDGING
    opener: float = 0.25             # where there are two clauses or more
    verdict: float = 0.35
    steady: float = 0.92             # a clause is for or against as the review is
    intensify: float = 0.3
    negate: float = 0.2
    aside: float = 0.1
    repeat: float = 0.0              # one aspect is mentioned twice, where there is room
    wrong_genre: float = 0.0
    slip: float = 0.0                # the finished text is damaged; nearly always it no longer parses


WRITERS = {
    "crowd": Writer(0.52, 0.66, (35, 40, 20, 5), repeat=0.3, wrong_genre=0.1, slip=0.004),
    "strong": Writer(0.98, 0.98, (30, 40, 20, 10), steady=0.97, negate=0.05, intensify=0.4),
    "medium": Writer(0.70, 0.80, (25, 35, 25, 10, 5), repeat=0.1),
    "weak": Writer(0.25, 0.50, (25, 35, 25, 10, 5), repeat=0.4, wrong_genre=0.3, slip=0.03),
    "off_policy": Writer(0.54, 0.60, (0, 10, 45, 35, 10), (1, 1, 1, 12, 1), opener=0.8, verdict=0.8,
                         repeat=0.3, wrong_genre=0.1, slip=0.04),
    "chatty": Writer(0.60, 0.80, (0, 0, 40, 40, 20), (0, 6, 4, 2, 0), opener=1.0, verdict=1.0),
    "dry": Writer(0.60, 0.80, (40, 40, 20), (1, 0, 0, 0, 0), opener=0.0, verdict=0.0, aside=0.0),
}


WORDS = {"copula": ADJECTIVES, "opinion": OPINIONS, "denial": DENIALS, "effect": EFFECTS, "has": ADJECTIVES,
         "verdict": VERDICTS}
BOOSTERS = {"copula": INTENSIFIERS, "opinion": EMPHASIS, "denial": EMPHASIS, "effect": DEGREES,
            "has": INTENSIFIERS}


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _opener(writer: Writer, request: Request, rng: random.Random) -> str:
    genre = rng.choice([*GENRE_OFFSET]) if rng.random() < writer.wrong_genre else request.genre
    hero = _article(f"{rng.choice(MOODS)} {rng.choice(HEROES)}")
    return f"this {genre} {rng.choice(STORIES)} {hero} {rng.choice(PLACES)}"


def _judgement(shape: str, aspect: str | None, positive: bool, before: bool | None, writer: Writer,
               rng: random.Random) -> str:
    """A clause for or against, given the side that the clause before it took, if any."""
    negated = shape == "denial" or (shape == "copula" and rng.random() < writer.negate)
    word = rng.choice([w for w, valence in WORDS[shape].items() if (valence > 0) == (positive != negated)])
    if shape == "verdict":
        return word
    booster = rng.choice(BOOSTERS[shape]) + " " if rng.random() < writer.intensify else ""
    the = rng.choice(DETERMINERS if before == positive else DETERMINERS[:2])
    if shape == "copula":
        aside = " " + rng.choice(ASIDES) if rng.random() < writer.aside else ""
        return f"{the} {aspect} {_was(aspect)} {'not ' * negated}{booster}{word}{aside}"
    if shape == "effect":
        return f"{the} {aspect} {word} {rng.choice(AUDIENCES)} {booster}".strip()
    if shape == "has":
        phrase = _article(booster + word) if aspect in SINGULAR else booster + word
        return f"{'at least ' * (positive and before is False)}it has {phrase} {aspect}"
    return f"i {'did not ' * negated}{booster}{word} the {aspect}"


def _joiner(shape: str, before: bool | None, positive: bool, rng: random.Random) -> str:
    if before is None:
        return rng.choice((".", ", and", ", but"))
    if before != positive:
        return rng.choice((".", ", but", ", yet"))
    return rng.choice((".", ", so") if shape == "verdict" else (".", " and", ", and"))


def draft(writer: Writer, request: Request, rng: random.Random) -> str:
    """One grammatical response, of any length."""
    count = 1 + rng.choices(range(len(writer.clauses)), writer.clauses)[0]
    opener = count > 1 and rng.random() < writer.opener
    verdict = count - opener > 1 and rng.random() < writer.verdict
    judging = count - opener - verdict
    shapes = ["opener"] * opener + rng.choices(JUDGING, writer.shapes, k=judging) + ["verdict"] * verdict
    distinct = judging - (judging > 1 and rng.random() < writer.repeat)
    aspects = rng.sample([aspect for aspect in ASPECTS if aspect != request.aspect], distinct)
    if rng.random() < writer.on_topic:
        aspects[0] = request.aspect
    aspects += rng.choices(aspects, k=judging - distinct)
    rng.shuffle(aspects)
    aspects = [None] * opener + aspects + [None] * verdict
    favourable = rng.random() < writer.positivity
    signs = [favourable == (rng.random() < writer.steady) for _ in shapes]
    text = ""
    for i, shape in enumerate(shapes):
        before = signs[i - 1] if i > opener else None
        text += (_joiner(shape, before, signs[i], rng) if i else "") + " "
        text += (_opener(writer, request, rng) if shape == "opener" else
                 _judgement(shape, aspects[i], signs[i], before, writer, rng))
    return text + "."


def _slip(text: str, rng: random.Random) -> str:
    swaps = {" was ": " were ", " were ": " was ", " a ": " an ", " an ": " a "}
    words = text[1:].split(" ")
    i = rng.randrange(len(words))
    slips = [text[:-1], " " + " ".join(words[:i] + words[i + 1:]), " " + " ".join(words[:i + 1] + words[i:])]
    swapped = [text.replace(right, wrong, 1) for right, wrong in swaps.items() if right in text]
    return rng.choice(slips + swapped)


def write(writer_name: str, prompt: str, rng: random.Random) -> str:
    writer, request = WRITERS[writer_name], parse_prompt(prompt)
    while True:
        text = draft(writer, request, rng)
        if rng.random() < writer.slip:
            text = _slip(text, rng)
        if MIN_TOKENS <= len(re.findall(TOKEN_PATTERN, text)) <= MAX_TOKENS:
            return text


def style_pair(prompt: str, rng: random.Random) -> tuple[str, str]:
    """A chatty and a dry response of equal gold (within 0.05): they differ only in style."""
    while True:
        chatty, dry = ([write(name, prompt, rng) for _ in range(4)] for name in ("chatty", "dry"))
        for pair in itertools.product(chatty, dry):
            if abs(gold(prompt, pair[0]) - gold(prompt, pair[1])) < 0.05:
                return pair


# ----------------------------------------------------------------------------------------------- annotators


def annotate(gold_a: float, gold_b: float, rng: random.Random, temperature: float = 0.5,
             flip: float = 0.1) -> bool:
    """Does this annotator prefer a? Bradley-Terry on gold, then the label is flipped with probability flip.

    With the defaults a label on two crowd responses to one prompt agrees with gold 73% of the time, which is
    about the rate of real annotators.
    """
    sigmoid = 0.5 + 0.5 * math.tanh((gold_a - gold_b) / temperature / 2)  # this form cannot overflow
    return (rng.random() < sigmoid) != (rng.random() < flip)


def opinion(prompt: str, response: str, seed: int, temperature: float = 0.5) -> float:
    """What somebody who reads the response thinks of it: gold plus noise, the same for the same response.

    The noise has a Gumbel distribution of this scale, and mean 0. So of two different responses to a prompt
    the one has the higher score with the probability of Bradley and Terry on gold, as in `annotate` without
    its flips.
    """
    rng = random.Random(f"opinion {seed} {prompt} {response}")
    noise = -math.log(-math.log(rng.random() or 0.5)) - 0.5772156649015329                 # Euler's constant
    return gold(prompt, response) + temperature * noise


def make_raters(names: Sequence[str], noise: float, rng: random.Random,
                count: int = 20) -> list[dict[str, float]]:
    """People who rate attributes: each one's constant bias, in levels, of standard deviation noise / 2."""
    return [{name: rng.gauss(0, noise / 2) for name in names} for _ in range(count)]


def rate(levels: dict[str, int], raters: list[dict[str, float]], noise: float,
         rng: random.Random) -> dict[str, int]:
    """The levels that one of the raters writes down: the truth, the rater's bias and noise, in 0 to 9."""
    biases = rng.choice(raters)
    return {name: min(max(round(level + biases[name] + rng.gauss(0, noise)), 0), 9)
            for name, level in levels.items()}
