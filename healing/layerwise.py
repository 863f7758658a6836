"""Run a transformers model with one decoder layer in memory at a time.

The model is built without weights. Its own forward pass runs once, with stand-ins for the layers that record what each
is called with (masks, rotary angles, windows). From then on, layers are loaded, run over the whole text and unloaded
one by one. This works for any class whose layers depend only on the hidden states, the positions and what earlier
layers pass on (shared keys and values); other classes are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError
from rehead.models.config import causal_lm_class
from rehead.models.linalg import fast_products
from rehead.models.model import Model
from rehead.models.watch import PROBE, Reached, register_probe


@dataclass(frozen=True)
class Call:
    """A layer's arguments besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def rows(self, count: int) -> Call:
        """The call for the first ``count`` sequences of a batch."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] > count:
                return value[:count]
            if isinstance(value, tuple):
                return tuple(cut(item) for item in value)
            return value

        return Call(cut(self.args), {key: cut(value) for key, value in self.kwargs.items()})

    def handing_on(self, carried: dict[str, Any]) -> Call:
        """The call with a batch's own mappings for what layers pass on, which the model gives its first layer empty.

        Args:
            carried: the mappings by the argument's name; the layer adds to them.
        """
        kwargs = dict(self.kwargs)
        for name, value in kwargs.items():
            if isinstance(value, MutableMapping) and not value:
                kwargs[name] = carried.setdefault(name, type(value)())
        return Call(self.args, kwargs)


class _StandIn(nn.Module):
    """Takes a layer's place, records its call, and returns the hidden states unchanged."""

    def __init__(self, original: nn.Module, note: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)  # not as a submodule, so it is neither moved nor counted
        self._note = note

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return self._note(hidden, Call(tuple(args[1:]), kwargs))


class _WantsTuple(Exception):
    """Raised when the model expects a layer to return a tuple."""


class LayerwiseModel:
    """A model that is run layer by layer.

    Args:
        model: the open checkpoint whose weights are streamed.
        config: the config to build the class from: the source's, or the converted one's.
        device: the device that layers run on.
        attention: makes, as shapes, the attention module that replaces the class's own, of each layer where one does.
    """

    def __init__(
        self,
        model: Model,
        config: Any,
        device: torch.device,
        attention: Mapping[int, Callable[[], nn.Module]] = MappingProxyType({}),
    ) -> None:
        from accelerate import init_empty_weights

        self.model, self.device = model, device
        register_probe()
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            self.module = causal_lm_class(config)(copy.deepcopy(config)).eval()  # _use() writes to it
        self.module.requires_grad_(False)
        path = model.module_layer.split("{i}")[0].rstrip(".")
        self.layers: nn.ModuleList = self.module.get_submodule(path)  # type: ignore[assignment]
        for layer, make in attention.items():
            self.layers[layer].set_submodule(model.family.attention.rstrip("."), make())
        #: By attention implementation and length of the sequences.
        self.calls: dict[tuple[str, int], list[Call]] = {}
        self._loaded: set[int] = set()
        #: Whether products of weights are taken in TF32.
        self.half = model.fast_on(device)
        self._implementation = self.module.config._attn_implementation or "eager"
        for name, buffer in list(self.module.named_buffers()):
            if not buffer.is_meta:
                owner = self.module.get_submodule(name.rpartition(".")[0])
                owner._buffers[name.rpartition(".")[2]] = buffer.to(device)

    @property
    def default(self) -> str:
        """The attention implementation that plain runs use."""
        return self._implementation

    # ---- before the layers

    def embed(self, tokens: Sequence[Tensor], batch_tokens: int, rank: int = 0, world: int = 1) -> list[Tensor]:
        """Run everything before the first layer and record what the layers are called with.

        Args:
            tokens: int64 [N, S] for each length of sequence.
            batch_tokens: tokens per forward pass.
            rank, world: of the sequences i, only those with i % world == rank are kept.

        Returns:
            Hidden states [N, S, n] for each length, float32, on the device.

        Raises:
            UnsupportedError: the layers' arguments depend on more than hidden states and positions.
        """
        self._load_outside()
        states = [self._embed(part, batch_rows(len(part), part.shape[1], batch_tokens), rank, world) for part in tokens]
        self._unload_outside()
        return states

    def _embed(self, tokens: Tensor, batch: int, rank: int, world: int) -> Tensor:
        hidden: list[Tensor] = []
        for start in range(0, len(tokens), batch):
            kept = slice((rank - start) % world, None, world)
            rows = tokens[start : start + batch].to(self.device)
            if start > batch:  # what layers are called with has been seen and compared
                rows, kept = rows[kept], slice(None)
                if not len(rows):
                    continue
            first, calls = self._until_layers(rows, self.default)
            hidden.append(first[kept].float())
            if start == 0:
                self.calls[self.default, tokens.shape[1]] = calls
            elif start == batch:
                self._refuse_dependence(calls, rows)
        self.calls[PROBE, tokens.shape[1]] = self._until_layers(tokens[:batch].to(self.device), PROBE)[1]
        return torch.cat(hidden)

    def _until_layers(self, tokens: Tensor, implementation: str) -> tuple[Tensor, list[Call]]:
        self._use(implementation)
        for as_tuple in (False, True):
            try:
                return self._note_calls(tokens, as_tuple)
            except _WantsTuple:
                continue
            except (ValueError, TypeError):  # the model unpacks what a layer returns
                if as_tuple:
                    raise
        raise UnsupportedError(
            f"{self.model.source.id}: its layers cannot be run one by one; use a method that needs no calibration"
        )

    def _note_calls(self, tokens: Tensor, as_tuple: bool) -> tuple[Tensor, list[Call]]:
        originals = list(self.layers)
        calls: list[Call] = []
        first: list[Tensor] = []

        def note(hidden: Tensor, call: Call) -> Any:
            if hidden.ndim != 3:
                raise _WantsTuple
            calls.append(call)
            if not first:
                first.append(hidden)
            if len(calls) == len(originals):
                raise Reached
            return (hidden, None) if as_tuple else hidden

        try:
            for i, layer in enumerate(originals):
                self.layers[i] = _StandIn(layer, note)
            with torch.no_grad():
                self.module.base_model(input_ids=tokens, use_cache=False)
        except Reached:  # the last layer has been called; the rest of the model is not needed
            pass
        finally:
            for i, layer in enumerate(originals):
                self.layers[i] = layer
        if len(calls) != len(originals):
            raise _WantsTuple
        return first[0], calls

    def _refuse_dependence(self, calls: list[Call], tokens: Tensor) -> None:
        """Refuse a model whose layers get the tokens by another way than the hidden states: calls that differ."""
        for first, second in zip(self.calls[self.default, tokens.shape[1]], calls):
            first = first.rows(len(tokens))
            if not _equal((first.args, first.kwargs), (second.args, second.kwargs)):
                raise UnsupportedError(
                    f"{self.model.source.id}: {self.model.config.model_type}'s layers are fed by the tokens directly, "
                    "so they cannot be calibrated one by one; use a method that needs no calibration"
                )

    def _load_outside(self) -> None:
        """Load all modules before the layers; embeddings stay in the checkpoint's dtype, their outputs are float32."""
        inside = self.model.family.layer.split("{i}")[0]
        output = self.module.get_output_embeddings()
        skip = {id(output.weight)} if output is not None and not self._tied(output) else set()
        wanted = {
            name
            for name, parameter in self.module.named_parameters()
            if id(parameter) not in skip and not name.startswith(self.model.module_layer.split("{i}")[0])
        }
        tensors = {}
        for name in self.model.source.tensors:
            if not name.startswith(inside) and (full := self.model.module_name(name)) in wanted:
                tensors[full] = self.model.read(name, device=self.device)
        self._assign(tensors, keep_dtype=True)
        for module in self.module.modules():
            if isinstance(module, nn.Embedding) and not module.weight.is_meta:
                module.register_forward_hook(_widen)
        for name, parameter in self.module.named_parameters():
            if name in tensors and not isinstance(self._owner(name), nn.Embedding):
                parameter.data = parameter.data.float()

    def _unload_outside(self) -> None:
        for module in self.module.modules():
            if isinstance(module, nn.Embedding):
                module._forward_hooks.clear()
        inside = self.model.module_layer.split("{i}")[0]
        for name, parameter in list(self.module.named_parameters(remove_duplicate=False)):  # tied ones twice
            if not name.startswith(inside) and not parameter.is_meta:
                leaf = name.rpartition(".")[2]
                self._owner(name)._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _tied(self, output: nn.Module) -> bool:
        inputs = self.module.get_input_embeddings()
        return inputs is not None and getattr(inputs, "weight", None) is output.weight

    def _owner(self, name: str) -> nn.Module:
        return self.module.get_submodule(name.rpartition(".")[0])

    # ---- layers

    def load_layer(self, layer: int, new: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Load one layer's weights in float32; if the layer is loaded already, only ``new``.

        Args:
            layer: the layer's index.
            new: tensors that replace the checkpoint's, by the checkpoint's names.
        """
        prefix, new = self.model.family.layer.format(i=layer), new or {}
        there = [] if layer in self._loaded else [name for name in self.model.source.tensors if name.startswith(prefix)]
        names = list(dict.fromkeys([*there, *new]))
        tensors = {
            self.model.module_name(name): (
                new[name].to(self.device) if name in new else self.model.read(name, layer, self.device)
            )
            for name in names
        }
        self._assign({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
        module = self.layers[layer]
        left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if left:
            raise UnsupportedError(
                f"{self.model.source.id}: layer {layer} has no tensor for {left[0]}; the checkpoint is incomplete"
            )
        self._loaded.add(layer)
        return module

    def unload_layer(self, layer: int) -> None:
        """Free a layer's weights."""
        self._loaded.discard(layer)
        for module in self.layers[layer].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _assign(self, tensors: dict[str, Tensor], keep_dtype: bool = False) -> None:
        slots = dict(self.module.named_parameters(remove_duplicate=False)) | dict(self.module.named_buffers())
        rest = {name: tensor for name, tensor in tensors.items() if name not in slots}
        for name in tensors.keys() - rest.keys():
            owner, leaf = self._owner(name), name.rpartition(".")[2]
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(tensors[name], requires_grad=False)
            else:
                owner._buffers[leaf] = tensors[name]
        if rest:
            self._convert(rest)
        if keep_dtype:
            self.module.tie_weights()

    def _convert(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors that the class stores in another form (merged experts), by transformers' own conversion."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(self.module)
        load = LoadStateDictConfig(
            weight_mapping=mapping, device_map={"": self.device}, dtype=torch.float32, ignore_mismatched_sizes=False
        )
        with quiet_transformers():
            convert_and_load_state_dict_in_model(model=self.module, state_dict=tensors, load_config=load)
        self.module.requires_grad_(False)

    def run_layer(
        self, layer: int, hidden: Tensor, implementation: str | None = None, carried: dict[str, Any] | None = None
    ) -> Tensor:
        """A loaded layer's output on a batch of hidden states [b, S, n].

        Args:
            layer: the layer's index.
            hidden: hidden states before the layer.
            implementation: an attention implementation; :attr:`default` when None.
            carried: what the layers before passed on for these sequences; this layer adds to it.
        """
        implementation = implementation or self.default
        self._use(implementation)
        call = self.calls[implementation, hidden.shape[1]][layer].rows(len(hidden))
        call = call.handing_on({} if carried is None else carried)
        with fast_products(self.half and implementation != PROBE):
            result = self.layers[layer](hidden, *call.args, **call.kwargs)
        return result[0] if isinstance(result, tuple) else result

    def _use(self, implementation: str) -> None:
        for module in self.module.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                config._attn_implementation = implementation


def batch_rows(count: int, length: int, batch_tokens: int) -> int:
    """Sequences per forward pass over ``count`` of a length: at least one, and about equally many in each pass."""
    most = max(1, batch_tokens // length)
    return -(-count // -(-count // most))


def _widen(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return True
