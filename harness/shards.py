"""--shard: every process keeps a part of the weights, by torch's own engine, FSDP2 (`fully_shard`).

Each layer of a model is a unit: its weights are put together for its forward pass and again for its backward
pass, and then dropped. So is what surrounds the layers, the base model's embeddings and last norm. The LM
head, which common.py calls apart and chunk by chunk, is put together once in a forward pass, tied or not, and
stays until the backward pass. Gradients are added up over the processes, and each keeps its part of the sum;
so does the optimizer with its moments. The work is divided as without --shard: see ranks.py.

Putting weights together takes all processes at once. So all make equally many passes: see Run.microbatches.
"""
import functools
import gc
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
from common import UserError
from harness import ranks

NO_COPY = "a model in shards cannot be copied, as raft.py --refresh and steerlm.py --predictor lm need: " \
          "leave out --shard"


def check(config):
    """UserError where --shard cannot work in this process."""
    if config.shard and ranks.count() == 1:
        raise UserError("--shard needs several processes: torchrun --nproc-per-node N, with N above 1")
    if config.shard:
        from torch.distributed.fsdp import FSDPModule
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise UserError(f"--shard needs a later torch than {torch.__version__}: pip install -U torch")


def load(config, make, mean=False):
    """What make(device, dtype) loads, a model or a common.RewardModel; in shards with --shard.

    The processes of a machine take turns: its memory holds one whole model at a time. mean: see split.
    """
    if not config.shard:
        return make(config.device, config.dtype)
    gc.collect()                                  # an earlier model in shards: its references go in circles
    device = common.pick_device(config.device).type
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    mesh = mesh_of(device)
    with ranks.in_turn():
        found = make("cpu", dtype)
        split(found.model if isinstance(found, common.RewardModel) else found, mesh, mean)
    return found


@functools.cache
def mesh_of(device):
    """All processes in a row."""
    return dist.device_mesh.init_device_mesh(device, (ranks.count(),))


def split(model, mesh, mean=False):
    """Leave this process its part of the model's weights. No process waits for another here.

    mean: gradients are the mean over processes, not the sum: where all of them read the same rows.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    def size(module):
        return sum(weight.numel() for weight in module.parameters())

    base = model.base_model
    lists = [part for part in base.modules() if isinstance(part, torch.nn.ModuleList)]
    layers = max(lists, key=size, default=())
    inner = [part for part in base.modules() if size(part) == size(base)][-1]      # OPT calls its decoder
    around = [part for part in model.children() if part is not base and [*part.parameters()]]
    heads = [part for part in around if type(part) is torch.nn.Linear]                  # of logits or scores
    tied = {id(weight): name for name, weight in base.named_parameters()}
    for unit in (*layers, inner, *(part for part in around if part not in heads)):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for head in heads:
        for name, weight in list(head.named_parameters()):
            same = tied.get(id(weight))
            setattr(head, name, base.get_parameter(same) if same else in_shards(weight, mesh))
        head.forward = lambda states, head=head: whole_head(head, mean)(states)
    logits = getattr(model, "get_output_embeddings", lambda: None)()
    if logits in heads:
        model.get_output_embeddings = lambda: whole_head(logits, mean)        # common.py asks once in a pass
    # GPT-2's states are a view, which nothing here changes in place
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP\w*Model\) returned a view")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)                       # all that gloo can do
            getattr(module, "set_reduce_scatter_unused_params", bool)(True)      # experts that had no token
            module.set_gradient_divide_factor(ranks.count() if mean else 1.0)
    model.autocast = functools.partial(torch.autocast, cache_enabled=False)      # keeps no copies of weights
    model.__deepcopy__ = no_copy
    if hasattr(model, "generate"):
        sample_together(model)
    if "device" in vars(model):                                                  # of common.ValueModel
        model.device = base.device


def in_shards(weight, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor
    part = distribute_tensor(weight.detach().to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
    return torch.nn.Parameter(part, requires_grad=weight.requires_grad)


def whole_head(head, mean):
    """The function from states [..., D] to logits [..., V] by the head's weights, put together now."""
    from torch.distributed.tensor import Partial
    weights = {name: weight.full_tensor(grad_placements=[Partial()])                    # gradients: the sum
               for name, weight in head.named_parameters()}
    for weight in weights.values():
        if mean and weight.requires_grad:
            weight.register_hook(lambda gradient: gradient / ranks.count())
    return lambda states: F.linear(states, **weights)


def no_copy(memo):
    raise UserError(NO_COPY)


# --------------------------------------------------------------------------------------------------- sampling

def sample_together(model):
    """Let model.generate go on until all processes have their tokens, and model.wait until all are done."""
    plain = model.generate
    one = torch.ones(1, 1, dtype=torch.long)

    def anyone(samples):
        flag = torch.tensor(int(samples), device=model.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def generate(**inputs):
        anyone(True)
        return plain(**inputs, synced_gpus=True)

    def wait():
        while anyone(False):                               # another process samples: take part in it
            ids = one.to(model.device)
            with torch.no_grad(), common.compute(model):
                plain(input_ids=ids, attention_mask=ids, max_new_tokens=1, do_sample=False, synced_gpus=True)

    model.generate, model.wait = generate, wait


# ------------------------------------------------------------------------------------------------------ files

def whole(value):
    """A state dict with its tensors whole and on the CPU, in the first process; the others get None there."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    if not hasattr(value, "full_tensor"):
        return value
    together = value.full_tensor()
    return together.cpu() if ranks.first() else None


def like(value, own):
    """This process's part of a whole tensor, if `own` is in shards."""
    if not hasattr(own, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def cut(state, trained, optimizer):
    """Put this process's parts in place of the whole tensors of a checkpoint."""
    own = trained.state_dict()
    state["trained"] = {name: like(value, own.get(name)) for name, value in state["trained"].items()}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for i, moments in state["optimizer"]["state"].items():
        moments |= {name: like(value, weights[i]) for name, value in moments.items()
                    if getattr(value, "shape", None) == weights[i].shape}


def whole_model(model):
    """The same model whole, on the CPU, in the first process; None in the others, which take part."""
    weights = whole(model.state_dict())
    if not ranks.first():
        return None
    with torch.device("meta"):
        copy = type(model)._from_config(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    for name in ("generation_config", "saved_dtype"):
        if hasattr(model, name):
            setattr(copy, name, getattr(model, name))
    return copy


def number(value):
    """A number, or a tensor that holds one, in shards or not."""
    if not torch.is_tensor(value):
        return value
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
