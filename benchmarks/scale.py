"""Memory of a GPU for models of 1B, 7B and 70B: worked out by `phases`, which small models on the CPU check.

    python benchmarks/scale.py                  the tables of docs/scale.md, in Markdown
    python benchmarks/scale.py --measure        measures the small models again: results/scale.json (Linux)

Counted: float32 weights, their gradients and AdamW's two moments, where they are whole or in shards; weights
that are put together for a pass; what a pass keeps for its backward pass; logits. Not counted: CUDA's and
NCCL's own memory, and what the allocator cannot use.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "results" / "scale.json"


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's form. All sizes in numbers of floats."""
    layers: int
    hidden: int
    inner: int                       # of the MLP
    keys: int                        # of one token's keys in a layer: key heads times their size
    words: int                       # vocabulary
    tied: bool = False

    @property
    def layer(self):
        """Weights of a layer: four projections of attention, three of the MLP, two norms."""
        return self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.inner + 2)

    @property
    def table(self):
        """Weights of the embeddings, and of the head."""
        return self.words * self.hidden

    @property
    def weights(self):
        return self.layers * self.layer + self.table * (1 if self.tied else 2) + self.hidden

    @property
    def body(self):
        """Weights without the LM head, as of a value or a reward model."""
        return self.weights - (0 if self.tied else self.table)

    def adapter(self, rank):
        """Weights of a LoRA adapter: rank * (inputs + outputs) of each projection."""
        widths = 2 * (2 * self.hidden) + 2 * (self.hidden + self.keys) + 3 * (self.hidden + self.inner)
        return self.layers * rank * widths


SHAPES = {"1B": Shape(16, 2048, 8192, 512, 128256, tied=True),                        # Llama 3.2 1B
          "7B": Shape(32, 4096, 11008, 4096, 32000),                                 # Llama 2 7B
          "8B": Shape(32, 4096, 14336, 1024, 128256),                                # Llama 3.1 8B
          "70B": Shape(80, 8192, 28672, 1024, 128256)}                               # Llama 3 70B
SMALL = {"20M": Shape(8, 384, 1024, 384, 8000), "80M": Shape(10, 768, 2048, 768, 8000)}
# How many models live while a method trains. Trained: the policy; a value model. Frozen: a reward model; the
# reference.
METHODS = {"DPO and six others": (1, 1), "ReMax": (1, 2), "PPO": (2, 2)}
GPUS = 4, 8, 16, 32, 64
TOKENS, RESPONSES, ROOM, RANK = 4096, 2048, 2 ** 16, 16
CHUNK, FEW_LOGITS = 256, 2 ** 22                                  # of common.token_logps


def activations(shape, half):
    """Bytes that a layer keeps of a token: what stands before each of the two norms and after it, normed and
    weighted; queries, keys, values and their result; four of the MLP: gate, its SiLU, up, their product."""
    stream, product = 4, 2 if half else 4                         # bytes of a float
    norms = 2 * shape.hidden * (stream + stream + product)
    return norms + product * (2 * shape.hidden + 2 * shape.keys + 4 * shape.inner)


def phases(shape, trained, frozen, processes=1, tokens=TOKENS, responses=RESPONSES, checkpointing=True,
           half=True, rank=0, room=ROOM, foreach=True):
    """Bytes of a process in each phase of training; the largest is what it needs.

    Args:
        trained, frozen: see METHODS; all of this shape. processes: 1 for whole models in each.
        tokens: of a forward pass, with responses among them. half: bfloat16 passes (autocast).
        rank: of LoRA adapters, 0 for all weights. room: tokens that are sampled at once.
        foreach: AdamW works on all weights at once, as on CUDA.
    """
    whole = shape.weights + (trained - 1) * shape.body
    own = trained * shape.adapter(rank) if rank else whole        # what is trained
    weights = 4 * (whole + shape.body + (frozen - 1) * shape.weights) / processes
    if rank:                                                      # the reference is the policy's own network
        weights += 4 * (own - (frozen - 1) * shape.weights)
    if processes == 1:                                            # frozen layers are in bfloat16
        weights -= 2 * half * (1 + trained if rank else frozen) * shape.layers * shape.layer
    moments, gradients = 8 * own / processes, 4 * own / processes
    states = weights + moments

    kept = shape.layers * tokens * (4 * shape.hidden if checkpointing else activations(shape, half))
    kept = trained * kept + 4 * 2 * responses * shape.hidden      # both graphs; states that the head reads
    within = tokens * activations(shape, half) * checkpointing + tokens * 4 * (3 * shape.inner + shape.hidden)
    chunk = responses if responses * shape.words <= FEW_LOGITS else CHUNK
    logits = 4 * 4 * chunk * shape.words                          # scaled, and two gradients and their sum

    shards, full = processes > 1, 0 if rank else 4                # bytes of a weight's gradient
    cast = 0 if rank else 2 * half                                # bytes of a copy that autocast keeps
    if shards:
        head, table = (4 + full + full) * shape.table, 12 * shape.table     # weights, gradient, its copy
        layer = 4 * 4 * shape.layer + 4 * shape.table             # this and the next, gradient, its copy
    else:
        head = table = full * shape.table
        layer = full * shape.hidden * shape.inner
    copies = cast * (shape.layer if shards and checkpointing else shape.weights)
    return {
        "head": states + gradients + kept + max(copies, head + logits + 2 * half * shape.table),
        "layer": states + gradients + kept + within + layer + cast * (
            shape.layer if checkpointing else shape.weights),
        "embeddings": states + gradients + table,
        "optimizer": states + gradients + (4 * own if foreach else 8 * shape.table) / processes,
        "sampling": states + room * (6 if half else 8) * shape.keys * shape.layers + copies * (not shards)
        + (4 * 2 * (shape.layer + shape.table) if shards else 0)}


def need(*args, **kwargs):
    """GB (1e9) that a process needs."""
    return max(phases(*args, **kwargs).values()) / 1e9


def tables():
    """docs/scale.md's table of memory, and that of the check, as Markdown."""
    heads = ["LoRA", "whole", *(f"{n} shards" for n in GPUS)]
    lines = ["| model | method | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 2) + "|"]
    for size, shape in SHAPES.items():
        for method, models in METHODS.items():
            cells = [need(shape, *models, rank=RANK), need(shape, *models),
                     *(need(shape, *models, processes=n) for n in GPUS)]
            lines.append(f"| {size} | {method} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |")
    lines += ["", "| model | method | processes | activations | MB counted | MB measured | "
              "counted / measured |",
              "| --- " * 7 + "|"]
    for row in json.loads(FILE.read_text(encoding="utf-8"))["rows"]:
        counted = counted_of(row)
        lines.append(f"| {row['size']} | {row['method']} | {row['processes']} | "
                     f"{'computed again' if row['checkpointing'] else 'kept'} | {counted:,.0f} | "
                     f"{row['measured']:,.0f} | {counted / row['measured']:.2f} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- the check

ROWS = [dict(size=size, method=method, processes=n, checkpointing=again)
        for size in SMALL for method, n, again in (("DPO", 1, False), ("DPO", 2, True), ("PPO", 1, False),
                                                   ("PPO", 2, False))]
STEP = dict(tokens=512, responses=256, half=False, room=0, foreach=False)


def counted_of(row):
    """MB (1e6) that `phases` counts for a row of the check."""
    models = next(models for name, models in METHODS.items() if row["method"] in name)
    return 1e3 * need(SMALL[row["size"]], *models, processes=row["processes"],
                      checkpointing=row["checkpointing"], **STEP)


def resident(name):
    """MB (1e6) of this process: VmRSS now, VmHWM at most since reset()."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 / 1e6


def reset():
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(folder, method, again):
    """Two steps of a method's passes over models in `folder`; prints the MB that they took."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoModelForSequenceClassification

    import common
    import harness
    from harness import loading, ranks, shards
    torch.set_num_threads(1)
    ranks.start("cpu")

    def config(path):
        return harness.Config(model=path, data="none", device="cpu", shard=ranks.count() > 1,
                              gradient_checkpointing=again)

    def load(path):
        """The models of a method, and its step over so many tokens."""
        own = config(path)
        models = [harness.load_policy(own)]
        if method == "PPO":
            models.append(shards.load(own, lambda *place: common.load_value_model(path, None, *place)))
            loading.lightened(own, models[1].base_model)
        frozen = [shards.load(own, lambda *place: common.load(
            AutoModelForSequenceClassification, path, *place, num_labels=1))]
        if method == "PPO":
            frozen.append(loading.load_reference(own))
        optimizer, _ = common.adamw(torch.nn.ModuleList(models), 1e-4, 10)

        def step(tokens, responses):
            torch.manual_seed(0)
            rows = tokens // 128 or 1
            ids = torch.randint(models[0].config.vocab_size, (rows, tokens // rows))
            mask = torch.ones_like(ids)
            answers = (torch.arange(ids.shape[1]) >= ids.shape[1] - responses // rows) * mask
            batch = common.Batch(ids, mask, answers)
            with torch.no_grad():
                common.sequence_scores(frozen[0], batch)
                for reference in frozen[1:]:
                    common.sequence_logps(reference, batch)
            for part in range(2):                                 # gradients are there in the second one
                loss = -common.sequence_logps(models[0], batch).mean()
                if method == "PPO":
                    loss = loss + common.token_values(models[1], batch).square().mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_([w for model in models for w in model.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return step

    load(f"{folder}/warm")(64, 32)                                # libraries take what they need
    before = resident("VmRSS")
    step = load(f"{folder}/model")
    step(16, 8)                                                   # makes the moments
    reset()
    step(STEP["tokens"], STEP["responses"])
    found = ranks.gathered(resident("VmHWM") - before)
    if ranks.first():
        print(json.dumps(sum(found) / len(found)))


def measure_all():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    rows = []
    for size, shape in SMALL.items():
        with tempfile.TemporaryDirectory() as folder:
            for name, made in (("model", shape), ("warm", Shape(2, 64, 128, 64, 1000))):
                torch.manual_seed(0)
                model = LlamaForCausalLM(LlamaConfig(
                    vocab_size=made.words, hidden_size=made.hidden, intermediate_size=made.inner,
                    num_hidden_layers=made.layers, num_attention_heads=made.hidden // 32,
                    num_key_value_heads=made.keys // 32, tie_word_embeddings=made.tied))
                assert sum(weight.numel() for weight in model.parameters()) == made.weights
                model.save_pretrained(f"{folder}/{name}")
            for row in (row for row in ROWS if row["size"] == size):
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                            str(row["processes"])] if row["processes"] > 1 else []
                done = subprocess.run(
                    [sys.executable, *launcher, __file__, "--one", folder, row["method"],
                     str(int(row["checkpointing"]))], stdout=subprocess.PIPE, text=True, encoding="utf-8",
                    # blocks from 64 KB on are given back when they are free
                    env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}, check=True)
                rows.append(row | {"measured": round(json.loads(done.stdout.splitlines()[-1]), 1)})
                print(json.dumps(rows[-1]), f"counted {counted_of(rows[-1]):.1f}", flush=True)
    FILE.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
    elif sys.argv[1:] == ["--measure"]:
        measure_all()
    else:
        print(tables())
