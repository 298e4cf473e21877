"""What each parameter of a model is, from the modules that hold it.

A weight is a matrix for the matrix optimizer if it maps hidden features to hidden features. Modules tell: a Linear
does whose outputs another layer takes, whole or in parts. An embedding, an output head, the router of a mixture of
experts and a weight of one row or column do not. What modules do not tell, such as a bare parameter, the last Linear of
a model or a small head inside a block, is `is_sure = False`, with the best guess.

Names are read for attention and fused weights only, `FUSED`, `QUERIES_KEYS_VALUES` and `_OF_ATTENTION`: no layer takes
the keys and values of grouped queries, and whether the rows of a fused weight lie one part after the other cannot be
seen from its module. A fused weight that is not listed is one matrix, which is right for rows in any order.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .blocks import View

Role = Literal["hidden", "embedding", "head", "vector", "tensor"]
"""What a parameter is in its model: input embedding (also as a tied head), output head, at most 1-D or a norm gain,
more than 2-D (convolutions, experts), or anything else."""

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_exp", "n_routed_experts")

PLAIN = "2-D weight"


@dataclass(frozen=True)
class Seen:
    """What was found about a parameter."""

    role: Role
    is_matrix: bool
    """Whether it belongs to the matrix optimizer, by what is known or as a guess."""
    why: str
    is_sure: bool = True
    view: View | None = None
    fused: tuple[int, ...] | None = None
    """The rows of the parts of a fused weight, if they lie one after the other."""
    head_size: int | None = None
    """The rows of an attention head, if it is the weight of queries, keys or values."""
    optional: Literal["conv", "experts"] | None = None
    """What it could be a matrix as, if asked for."""
    is_flattened: bool = False
    """Whether it is the weight of a Linear and not 2-D."""


def examine(model: nn.Module) -> dict[Tensor, Seen]:
    """Every parameter of a model, tied ones once. Only shapes and modules are read, so the meta device is enough."""
    excluded = _excluded(model)
    found: dict[Tensor, Seen] = {}
    linears = _Linears(model, has_head=any("output head" in why for why in excluded.values()))
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            seen = _reason(p, excluded[p]) if p in excluded else _held(model, path, module, name, p, linears)
            # A tied parameter is what its first certain holder says.
            if p not in found or (seen.is_sure and not found[p].is_sure):
                found[p] = seen
    return found


def _excluded(model: nn.Module) -> dict[Tensor, str]:
    """Why parameters do not belong to the matrix optimizer, for those of known layers."""
    reasons: dict[Tensor, list[str]] = {}

    def add(p: object, reason: str) -> None:
        if isinstance(p, Tensor) and reason not in reasons.setdefault(p, []):
            reasons[p].append(reason)

    for module in model.modules():
        if isinstance(module, _EMBEDDINGS):
            add(module.weight, "embedding")
        if isinstance(module, _NORMS):
            add(module.weight, "norm gain")
        add(module._parameters.get("bias"), "bias")
        add(_weight_of(module, "get_input_embeddings"), "embedding")
        add(_weight_of(module, "get_output_embeddings"), "output head")
    for module in model.modules():
        if isinstance(module, nn.Linear) and "embedding" in reasons.get(module.weight, ()):
            add(module.weight, "output head")
    return {
        p: "embedding, tied to the output head" if why == ["embedding", "output head"] else ", ".join(why)
        for p, why in reasons.items()
    }


def _weight_of(module: nn.Module, getter: str) -> Tensor | None:
    """The weight of the layer that a method of transformers models returns, if there is one."""
    get = getattr(module, getter, None)
    if get is None:
        return None
    try:
        layer = get()
    except Exception:
        # The base classes of transformers raise for models without such a layer; those of other code may do anything.
        return None
    return getattr(layer, "weight", None)


def _reason(p: Tensor, why: str) -> Seen:
    if p.ndim < 2 or "norm gain" in why or "bias" in why:
        return Seen("vector", False, why)
    if p.ndim > 2:
        return Seen("tensor", False, why)
    role: Role = "embedding" if why.startswith("embedding") else "head" if "output head" in why else "hidden"
    return Seen(role, False, why)


def _held(model: nn.Module, path: str, module: nn.Module, name: str, p: Tensor, linears: "_Linears") -> Seen:
    """What a parameter is that no known layer excludes."""
    if p.ndim != 2 and isinstance(module, nn.Linear) and name == "weight":
        return Seen("vector", False, "not 2-D", is_flattened=True)
    parent = _parent(model, path)
    if p.ndim > 2:
        return _tensor(module, name, p, parent)
    if p.ndim < 2:
        return Seen("vector", False, "not 2-D")
    fused: tuple[int, ...] | None
    if 1 in p.shape:
        return Seen("hidden", False, "one row or column")
    around = _parent(model, path.rpartition(".")[0])
    if isinstance(module, nn.Linear) and len(p) in _expert_counts(parent) | _expert_counts(around, below=p.shape[1]):
        return Seen("hidden", False, "router of experts")
    if isinstance(module, nn.Linear) and name == "weight":
        return linears.seen(path, module, parent)
    if is_conv1d(module) and name == "weight":
        stored, weight = f"{PLAIN}, stored as inputs x outputs", p.mT
        fused, size = _parts(path, weight, parent), _head_size(path, weight, parent)
        return Seen("hidden", True, stored, view="in_out", fused=fused, head_size=size)
    if isinstance(module, nn.MultiheadAttention):
        fused = (len(p) // 3,) * 3 if name == "in_proj_weight" else None
        # out_proj is a Linear of its own; what is here are queries, keys and values.
        why = PLAIN + (", q, k and v" if fused else "")
        return Seen("hidden", True, why, fused=fused, head_size=module.head_dim)
    if isinstance(module, _RECURRENT):
        gates = (
            1 if name.startswith("weight_hr") else next((_GATES[kind] for kind in _kinds(module) if kind in _GATES), 1)
        )
        fused = (len(p) // gates,) * gates if gates > 1 else None
        return Seen("hidden", True, PLAIN + (f", {gates} gates" if fused else ""), fused=fused)
    if any(other is not None and other.ndim == 3 and len(other) == len(p) for other in module._parameters.values()):
        return Seen("vector", False, "a vector for each expert")
    if len(p) in _expert_counts(module):
        return Seen("hidden", False, "router of experts")
    return Seen("hidden", True, f"a bare parameter of {type(module).__name__}", is_sure=False)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a Linear whose weight is stored as inputs x outputs."""
    nf, weight = getattr(module, "nf", None), module._parameters.get("weight")
    return "Conv1D" in _kinds(module) and weight is not None and weight.ndim == 2 and weight.shape[1] == nf


def _kinds(module: nn.Module) -> list[str]:
    """The mode of a recurrent layer, and the names of its classes: subclasses, such as those that fully_shard makes of
    the class of a module, are what their bases are."""
    return [getattr(module, "mode", ""), *(cls.__name__ for cls in type(module).__mro__)]


def _tensor(module: nn.Module, name: str, p: Tensor, parent: nn.Module | None) -> Seen:
    """A parameter of more than two dimensions."""
    if isinstance(module, _CONVOLUTIONS) and name == "weight":
        is_matrix = module.groups == 1 and len(p) > 1 and p[0].numel() > 1
        return Seen("tensor", False, "not 2-D", view="flat", optional="conv" if is_matrix else None)
    if isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear) and name == "weight":
        return Seen("tensor", False, "not 2-D")
    if p.ndim == 3 and min(p.shape) > 1:
        if _is_transposed(module, parent, len(p)):
            return Seen("tensor", False, "not 2-D, stored as experts x inputs x outputs")
        return Seen("tensor", False, "not 2-D", view="stack", optional="experts")
    # Position embeddings and class tokens, [1, n, d], do not decay; other bare tensors are weights.
    return Seen("vector" if len(p) == 1 else "tensor", False, "not 2-D")


def _is_transposed(module: nn.Module, parent: nn.Module | None, count: int) -> bool:
    """Whether a module stores its stacks as [experts, inputs, outputs]."""
    said = getattr(module, "is_transposed", None)  # the experts of transformers, if they say so
    if isinstance(said, bool):
        return said
    stacks = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and len(p) == count]
    first, last = stacks[0], stacks[-1]
    # The first of them takes what the router takes; besides, the last returns as many features as the first takes.
    around = [] if parent is None else [parent, *parent.children()]
    near = [other for other in (*module.children(), *around) if other is not module]  # which has biases of that shape
    routers = [p for other in near for p in other._parameters.values() if p is not None and p.ndim == 2]
    inputs = {p.shape[1] for p in routers if len(p) == count}
    if len(inputs & set(first.shape[1:])) == 1 and first.shape[1] != first.shape[2]:
        return first.shape[1] in inputs
    return first.shape[2] != last.shape[1] and first.shape[1] == last.shape[2]


def _parent(model: nn.Module, path: str) -> nn.Module | None:
    return model.get_submodule(path.rpartition(".")[0]) if path else None


def _expert_counts(module: nn.Module | None, below: int | None = None) -> set[int]:
    """The numbers of experts that a module may choose from: what it says, lists of layers that it holds, and stacks of
    weights in it and in its children. Only those less than `below`, if it is given."""
    if module is None:
        return set()
    said = {count for name in _EXPERT_COUNTS if isinstance(count := getattr(module, name, None), int)}
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and len({type(each) for each in child.children()}) == 1:
            said.add(len(child))
    holders = [each for each in (module, *module.children()) if not isinstance(each, nn.modules.conv._ConvNd)]
    said |= {len(p) for each in holders for p in each._parameters.values() if p is not None and p.ndim == 3}
    return {count for count in said if count > 1 and (below is None or count < below)}


class _Linears:
    """The Linears of a model: which are inside blocks of layers, and whose outputs another layer takes."""

    def __init__(self, model: nn.Module, *, has_head: bool) -> None:
        self._has_head = has_head
        self._blocks = dict(_blocks(model))
        self._order: dict[str, int] = {}
        # Features -> the places in the order of layers that have so many inputs.
        self._takers: dict[int, list[int]] = {}
        self._vocabularies: set[tuple[int, int]] = set()
        # Block -> its Linears, in order.
        self._inside: dict[str, list[tuple[str, nn.Linear]]] = {}
        for place, (path, module) in enumerate(model.named_modules()):
            self._order[path] = place
            if (inputs := _inputs(module)) is not None:
                self._takers.setdefault(inputs, []).append(place)
            if isinstance(module, _EMBEDDINGS):
                self._vocabularies.add((module.num_embeddings, module.embedding_dim))
            if (block := self._blocks.get(path)) is not None and isinstance(module, nn.Linear):
                self._inside.setdefault(block, []).append((path, module))

    def seen(self, path: str, module: nn.Linear, parent: nn.Module | None) -> Seen:
        """What the weight of a Linear is."""
        outputs, place = module.out_features, self._order[path]
        takers = self._takers.get(outputs, [])
        if path in self._blocks:
            is_taken = any(other != place for other in takers) or self._is_inner(path, module)
        else:
            if not self._has_head and (outputs, module.in_features) in self._vocabularies:
                return Seen("head", False, "output head: as many outputs as an embedding has entries")
            is_taken = any(other > place for other in takers)
        if is_taken:
            fused, size = _parts(path, module.weight, parent), _head_size(path, module.weight, parent)
            return Seen("hidden", True, PLAIN, fused=fused, head_size=size)
        return Seen("head", True, f"no later layer takes its {outputs} outputs: perhaps an output head", is_sure=False)

    def _is_inner(self, path: str, module: nn.Linear) -> bool:
        """Whether a Linear of a block, whose outputs no layer takes as they are, is certainly neither a head nor a
        router: it belongs to an attention, a layer next to it takes its outputs in two to four parts, or it has at
        least as many outputs as inputs and no later layer of the block has the same inputs."""
        if path.rpartition(".")[2] in QUERIES_KEYS_VALUES | _OF_ATTENTION:
            return True
        inside = self._inside[self._blocks[path]]
        later = inside[[other for other, _ in inside].index(path) + 1 :]
        room = path.rpartition(".")[0]
        if any(
            other.rpartition(".")[0] == room and module.out_features == parts * next_to.in_features
            for other, next_to in later
            for parts in (2, 3, 4)
        ):
            return True
        is_last_of_its_inputs = all(other.in_features != module.in_features for _, other in later)
        return bool(later) and module.out_features >= module.in_features and is_last_of_its_inputs


def _inputs(module: nn.Module) -> int | None:
    """The number of input features of a layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, _NORMS) and module.weight is not None:
        return module.weight.shape[-1]
    weight = module._parameters.get("weight")
    if is_conv1d(module) and weight is not None:
        return weight.shape[0]
    # Norms of other libraries: a vector of gains.
    return len(weight) if weight is not None and weight.ndim == 1 else None


def _blocks(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Path of a layer and of the block that it is in: a child of a ModuleList or Sequential that has several layers, or
    of a ModuleDict whose keys are numbers (torchtitan)."""
    for path, container in model.named_modules():
        is_numbered = isinstance(container, nn.ModuleDict) and all(key.isdigit() for key in container)
        if not is_numbered and not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        for name, child in container.named_children():
            below = [inner for inner, module in child.named_modules() if inner and not list(module.children())]
            prefix = f"{path}.{name}" if path else name
            if len(below) > 1:
                yield from ((f"{prefix}.{inner}", prefix) for inner in below)


def _thirds(p: Tensor, parent: nn.Module | None) -> tuple[int, ...] | None:
    """q, k and v of equal size; GPTBigCode mixes them per head in a weight of that shape."""
    is_mixed = hasattr(parent, "multi_query")
    return (len(p) // 3,) * 3 if len(p) == 3 * p.shape[1] and not is_mixed else None


def _grouped(p: Tensor, parent: nn.Module | None) -> tuple[int, ...] | None:
    """q, k and v of an attention with fewer keys than queries (Phi-3)."""
    config, size = getattr(parent, "config", None), getattr(parent, "head_dim", None)
    queries, keys = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if not (isinstance(size, int) and isinstance(queries, int) and isinstance(keys, int)):
        return None
    parts = (queries * size, keys * size, keys * size)
    return parts if sum(parts) == len(p) else None


def _halves(p: Tensor, parent: nn.Module | None) -> tuple[int, ...] | None:
    return (len(p) // 2,) * 2 if len(p) % 2 == 0 else None


FUSED: Mapping[str, Callable[[Tensor, nn.Module | None], tuple[int, ...] | None]] = {
    "c_attn": _thirds,
    "qkv": _thirds,
    "Wqkv": _thirds,
    "qkv_proj": _grouped,
    "gate_up_proj": _halves,
}
"""Layers whose rows are known to lie one part after the other (GPT-2, nanoGPT, timm, MPT, Phi-3, GLM), with the rows of
the parts. `query_key_value` (GPT-NeoX, Bloom, Falcon) is not among them: its rows are mixed per head."""


def _parts(path: str, p: Tensor, parent: nn.Module | None) -> tuple[int, ...] | None:
    """The rows of the parts of a fused weight [outputs, inputs], None if it is one matrix as far as we know."""
    known: Any = FUSED.get(path.rpartition(".")[2])
    return None if known is None else known(p, parent)


_QUERIES = ("q_proj", "query", "wq", "q", "to_q", "query_proj", "q_lin", "linear_q")
_KEYS = ("k_proj", "key", "wk", "k", "to_k", "key_proj", "k_lin", "linear_k")
_VALUES = ("v_proj", "value", "wv", "v", "to_v", "value_proj", "v_lin", "linear_v")

QUERIES_KEYS_VALUES = frozenset({*_QUERIES, *_KEYS, *_VALUES, *FUSED} - {"gate_up_proj"})
"""Layers whose rows are heads of an attention, one after the other in each of their parts."""

_FUSED_OTHERWISE = ("query_key_value", "kv_proj", "to_kv", "to_qkv", "wkv", "in_proj", "gate_up_proj")
_COMPRESSED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wq_a", "wq_b", "wkv_a", "wkv_b")
_OF_ATTENTION = frozenset({*_FUSED_OTHERWISE, *_COMPRESSED})
"""Other layers whose outputs an attention or a gate takes apart: fused ones with rows in other orders, and compressed
keys and values (DeepSeek)."""

_HEAD_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads")


def _head_size(path: str, p: Tensor, parent: nn.Module | None) -> int | None:
    """The rows of a head of a weight [outputs, inputs], if its attention says how large they are, or how many."""
    name = path.rpartition(".")[2]
    if name not in QUERIES_KEYS_VALUES or (name in FUSED and _parts(path, p, parent) is None):
        return None
    sizes = [size for key in _HEAD_SIZES if isinstance(size := getattr(parent, key, None), int)]
    counts = [count for key in _HEAD_COUNTS if isinstance(count := getattr(parent, key, None), int) and count > 0]
    parts = _parts(path, p, parent) or (len(p),)
    # The keys and values of a cross-attention have other inputs, and perhaps fewer heads, than the queries.
    queries = [len(layer.weight) for key in _QUERIES if isinstance(layer := getattr(parent, key, None), nn.Linear)]
    rows = parts[0] if name in FUSED else next(iter(queries), 0)
    sizes += [rows // count for count in counts if rows % count == 0]
    return next((size for size in sizes if size > 0 and not any(part % size for part in parts)), None)
