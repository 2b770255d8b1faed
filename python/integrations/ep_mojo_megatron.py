"""Megatron-Core's MoE layer over the all-gather dispatchers of `ep_mojo.torch`, for inference.

    from ep_mojo_megatron import allocate_buffers, with_ep_mojo    # this folder is on PYTHONPATH

    spec = with_ep_mojo(get_gpt_layer_local_spec(num_experts=E))   # any spec in which there is a MoELayer
    model = GPTModel(config, spec, ...)
    allocate_buffers(config, tokens)                               # once, all ranks: the worst case of a rank
    with torch.inference_mode():
        model(...)

Nothing of Megatron-Core is changed: the spec names a subclass of its `MoELayer`, which makes a subclass of its
`MoETokenDispatcher`. That takes what routers give in either form:

* bool [T, E] with probabilities [T, E], of the routers that train (all of 0.16). Experts get rows by expert and their
  counts, which are numbers of the host: it waits once a layer, and a layer cannot be captured.
* top-k ids [T, K] with probabilities [T, K], of the router for inference (newer versions, with
  `transformer_impl="inference_optimized"`). Experts get the gathered rows and ids. The host waits for nothing. Outside
  of inference such a layer uses Megatron-Core's own dispatcher, as it always does.

Letters: T tokens of this rank, E experts, L of them here, K choices of a token, H channels, R ranks, n gathered rows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from ep_mojo.errors import ConfigError, ConfigMismatchError, DTypeError, ShapeError, UnsupportedError
from ep_mojo.torch import AllGatherDispatcher, AllGatherDispatcherBase, AllGatherVDispatcher
from ep_mojo.torch.checks import check_tensor
from ep_mojo.torch.streams import check_not_capturing

try:  # where experts for inference read how many rows are tokens
    from megatron.core.transformer.moe.token_dispatcher_inference import InferenceAllGatherDispatcherBase
except ImportError:  # 0.16 has no such experts
    InferenceAllGatherDispatcherBase = None

MAP_PROBS = (torch.float32, torch.bfloat16, torch.float16)
"""Types of probabilities that travel as float32 without being rounded."""
REFUSED = {
    "sequence_parallel": "leave tensor parallelism off",
    "moe_expert_capacity_factor": "set it to None: no token is dropped",
    "moe_pad_expert_input_to_capacity": "set it to False: experts get as many rows as there are",
    "moe_token_dropping": "set it to False: no token is dropped",
    "moe_router_padding_for_quantization": "set it to False; experts that need padding add it themselves",
    "moe_pad_experts_for_cuda_graph_inference": "set it to False, or use Megatron-Core's own dispatcher",
}
"""Settings that must be off, and what to do."""


def allocate_buffers(config: TransformerConfig, tokens: int, ep_group: dist.ProcessGroup | None = None) -> None:
    """Make what all layers share, once, before the first step. All ranks of the group call this.

    Args:
        config: Of the model: K and H are read.
        tokens: The most tokens of a rank in a step: sequences times their length in prefill, as they come to a layer.
        ep_group: The ranks among which experts are spread; None: Megatron-Core's group for that.

    Raises:
        EPError: See `AllGatherDispatcherBase.allocate_buffers`, whose class attributes (`reduce_dtype`, `timeout_s`)
            hold here too.
    """
    hidden = getattr(config, "moe_latent_size", None) or config.hidden_size
    group = parallel_state.get_expert_model_parallel_group() if ep_group is None else ep_group
    AllGatherVDispatcher.allocate_buffers(tokens, config.moe_router_topk, hidden, group)


def with_ep_mojo(spec: Any, **params: Any) -> Any:
    """A copy of `spec` in which every `MoELayer` is an `EPMojoMoELayer`.

    Args:
        spec: Of an MoE layer, a transformer layer or a block of them: `ModuleSpec`s, partial calls, and data classes
            and sequences of them.
        params: For `EPMojoMoELayer`: `dispatcher`. Also `pg_collection`, which `TransformerLayer` of 0.16 passes only
            to `MoELayer` itself: needed there if groups are not those of `parallel_state`.

    Raises:
        ConfigError: There is no `MoELayer` in it.
    """
    found, count = _replaced(spec, params)
    if not count:
        raise ConfigError(
            "there is no MoELayer in this spec",
            field="spec",
            value=spec,
            allowed="a spec of MoE layers",
            remedy="pass what get_gpt_layer_local_spec(num_experts=...) or the like gives",
        )
    return found


def _replaced(spec: Any, params: dict[str, Any]) -> tuple[Any, int]:
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        return dataclasses.replace(spec, module=EPMojoMoELayer, params={**spec.params, **params}), 1
    if isinstance(spec, functools.partial) and spec.func is MoELayer:
        return functools.partial(EPMojoMoELayer, *spec.args, **{**spec.keywords, **params}), 1
    if isinstance(spec, (list, tuple)) and type(spec) in (list, tuple):
        parts = [_replaced(each, params) for each in spec]
        return type(spec)(each for each, _ in parts), sum(n for _, n in parts)
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return spec, 0
    made, count = copy.copy(spec), 0
    for field in dataclasses.fields(spec):
        value, n = _replaced(getattr(spec, field.name, None), params)
        if n:
            object.__setattr__(made, field.name, value)  # it may be frozen
            count += n
    return (made, count) if count else (spec, 0)


class EPMojoMoELayer(MoELayer):
    """Megatron-Core's `MoELayer`, but for the token dispatcher.

    With `transformer_impl="inference_optimized"` of newer versions that is the dispatcher for inference, else the only
    one. `moe_token_dispatcher_type` is not read; the dispatcher that it names is made by the base, and not used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        dispatcher: type[AllGatherDispatcherBase] = AllGatherVDispatcher,
        **more: Any,
    ):
        """As that of the base; what it is given more goes there.

        Args:
            dispatcher: `AllGatherVDispatcher`, for any numbers of tokens, or `AllGatherDispatcher`.

        Raises:
            UnsupportedError, DTypeError: See `check_settings`.
        """
        groups = get_default_pg_collection() if pg_collection is None else pg_collection
        check_settings(config, groups)
        self._through = dispatcher
        super().__init__(config, submodules, layer_number, groups, **more)
        if not hasattr(self, "_inference_token_dispatcher"):
            self.token_dispatcher = self._make_dispatcher(groups)
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)

    def _setup_inference_mode(self, pg_collection: ProcessGroupCollection) -> None:
        super()._setup_inference_mode(pg_collection)
        self._inference_token_dispatcher = self._make_dispatcher(pg_collection)

    def _make_dispatcher(self, groups: ProcessGroupCollection) -> EPMojoTokenDispatcher:
        own = self.num_local_experts, self.local_expert_indices
        return EPMojoTokenDispatcher(*own, self.config, groups, self._through)


class EPMojoTokenDispatcher(MoETokenDispatcher):
    """Megatron-Core's interface of token dispatchers over one of `ep_mojo.torch`. No gradient goes through it.

    A step: `dispatch_preprocess`, `token_dispatch`, `dispatch_postprocess`, the experts, `combine_preprocess`,
    `token_combine`, `combine_postprocess`, by all ranks of the group alike. `allocate_buffers` comes first.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        through: type[AllGatherDispatcherBase] = AllGatherVDispatcher,
    ):
        """
        Args:
            num_local_experts: L.
            local_expert_indices: Their global numbers.
            config: Of the layer.
            pg_collection: Groups ep, tp, expt_tp and tp_ep are read.
            through: What moves the rows.

        Raises:
            UnsupportedError, DTypeError: See `check_settings`.
            ShapeError: Not L indices.
        """
        check_settings(config, pg_collection)
        super().__init__(config=config, pg_collection=pg_collection)
        self._rows = through(num_local_experts, local_expert_indices, config, pg_collection)
        self._places: torch.Tensor | None = None
        self._probs_dtype: torch.dtype | None = None  # of a router that gives maps; None: it gives ids
        self._too_many: torch.Tensor | None = None
        self._permutation: tuple[torch.Tensor, int, int] | None = None

    @property
    def routing_map(self) -> torch.Tensor | None:
        """int64 [n, K], the choices of all gathered tokens, -1 past the last; before token_dispatch the rank's own."""
        return self._rows.routing_map

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Run `shared_experts`, of [T, H], beside the step, and add what it gives in `combine_postprocess`."""
        self.shared_experts = shared_experts
        self._rows.set_shared_experts(shared_experts)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the routes; nothing is sent.

        Args:
            hidden_states: bfloat16 [..., H], T tokens.
            routing_map: bool [T, E], true for up to K experts of a token; or ids, int64 or int32 [T, K].
            probs: Of the experts: float32, bfloat16 or float16 [T, E]; or of the choices, float32 [T, K].

        Returns:
            hidden_states [T, H]; float32 [T, K], the choices' probabilities.

        Raises:
            UnsupportedError: Gradients are wanted.
            DTypeError, ShapeError, DeviceError: A map and its probabilities are not such tensors.
        """
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "no gradient goes through this dispatcher",
                field="torch.is_grad_enabled()",
                value=True,
                allowed="inference",
                remedy="call the model under torch.inference_mode() or torch.no_grad(); train with Megatron-Core's own",
            )
        self._permutation = self._probs_dtype = self._too_many = None
        if routing_map.dtype == torch.bool:
            tokens, choices = hidden_states.numel() // hidden_states.shape[-1], self.config.moe_router_topk
            shape = [tokens, self.config.num_moe_experts]
            check_tensor("routing_map", routing_map, [torch.bool], shape, hidden_states.device)
            check_tensor("probs", probs, MAP_PROBS, shape, hidden_states.device)
            self._probs_dtype = probs.dtype
            self._too_many = (routing_map.sum(1) > choices).sum()
            routing_map, probs = choices_of_map(routing_map, probs, choices)
        return self._rows.dispatch_preprocess(hidden_states, routing_map, probs)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather tokens, probabilities and routes of all ranks. All ranks call this.

        Args:
            hidden_states: bfloat16 [T, H].
            probs: float32 [T, K].

        Returns:
            [n, H] and [n, K], good until the next token_dispatch of any layer.

        Raises:
            ConfigMismatchError: The buffers are for a group of another size.
            EPError: See `AllGatherDispatcherBase.token_dispatch`.
        """
        rows, most = AllGatherVDispatcher._get_rsv_tensor(), AllGatherDispatcherBase._per_rank_worst_case_token_count
        if rows is not None and rows.shape[0] != most * self.ep_size:
            raise ConfigMismatchError(
                "the buffers are for another group",
                field="ranks of the expert group",
                value=self.ep_size,
                allowed=str(rows.shape[0] // most),
                remedy="call allocate_buffers with the group of this layer",
            )
        hidden_states, probs = self._rows.token_dispatch(hidden_states, probs)
        if self._probs_dtype is None and InferenceAllGatherDispatcherBase is not None:
            self._tell_experts()
        return hidden_states, probs

    def _tell_experts(self) -> None:
        """Put the number of valid rows where Megatron-Core's experts for inference look for it."""
        theirs, count = InferenceAllGatherDispatcherBase, self._rows._valid_tokens()
        if theirs._valid_tokens_tensor is None:
            theirs._valid_tokens_tensor = torch.zeros_like(count)
        theirs._valid_tokens_tensor.copy_(count)
        theirs._host_valid_tokens_estimate = self._rows._get_host_valid_tokens_estimate()

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Rows for the experts of this rank: of a map the host waits for their counts; of ids all as they are.

        Args:
            hidden_states: [n, H], of `token_dispatch`.
            probs: [n, K], the same.

        Returns:
            Of a map: a row for each choice of a local expert [m, H], by expert, then rank, then token; int64 [L] on
            the host, how many each expert has; their probabilities [m], in the router's type. Of ids: hidden_states,
            None, probs.

        Raises:
            ShapeError: A token of this rank has more than K experts, or ranks have different numbers of tokens and the
                dispatcher is one for equal ones. Peers wait for this rank until their deadline; then `reset`.
            OrderError: Of a map, inside the capture of a CUDA graph.
        """
        if self._probs_dtype is None:
            return hidden_states, None, probs
        check_not_capturing(
            hidden_states.device, "counts of experts cannot be read", "capture a layer of an inference-optimized model"
        )
        experts, choices = self._rows.num_local_experts, probs.shape[1]
        if self._places is None or self._places.device != hidden_states.device:
            self._places = self._make_places(hidden_states.device)
        places = self._places[self._rows.routing_map].flatten()  # the last entry, [-1], is for no choice
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=places.device)
        counts.scatter_add_(0, places, torch.ones_like(places))
        told = torch.cat([counts[:experts], self._too_many[None], self._rows._valid_tokens()]).tolist()
        counts, too_many, valid = told[:experts], *told[experts:]
        self._check_told(too_many, valid, hidden_states.shape[0])
        chosen = places[: valid * choices].argsort(stable=True)[: sum(counts)]
        rows = chosen // choices
        self._permutation = rows, valid, hidden_states.shape[0]
        weights = probs.flatten()[chosen].to(self._probs_dtype)
        return hidden_states[rows], torch.tensor(counts, device="cpu"), weights

    def _make_places(self, device: torch.device) -> torch.Tensor:
        """int64 [E + 1]: the local number of each expert, L for those of other ranks and for none."""
        experts = self._rows.num_local_experts
        places = torch.full((self.config.num_moe_experts + 1,), experts, dtype=torch.int64, device=device)
        places[self._rows.local_expert_indices] = torch.arange(experts, device=device)
        return places

    def _check_told(self, too_many: int, valid: int, rows: int) -> None:
        if too_many:
            raise ShapeError(
                f"{too_many} tokens have more experts than the router may choose",
                field="routing_map",
                value=f"more than {self.config.moe_router_topk} true in a row",
                allowed=f"up to {self.config.moe_router_topk} (moe_router_topk)",
                remedy="leave padding and capacities of experts off",
            )
        if valid > rows or (valid != rows and isinstance(self._rows, AllGatherDispatcher)):
            raise ShapeError(
                "ranks have different numbers of tokens",
                field="tokens of all ranks",
                value=valid,
                allowed=f"{rows}, this rank's times the ranks",
                remedy="with_ep_mojo(spec, dispatcher=AllGatherVDispatcher), or AllGatherDispatcher._use_allgather_v",
            )

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of a map: add up, in float32, what local experts give for each gathered token; of ids: as it is.

        Experts have applied the probabilities. On GPUs the order of a sum is not fixed, unless
        `torch.use_deterministic_algorithms` says so; on the host it is experts ascending.

        Args:
            hidden_states: [m, H], the rows of `dispatch_postprocess`.

        Returns:
            [n, H] in `reduce_dtype`, unspecified past the valid rows.
        """
        if self._permutation is None:
            return hidden_states
        rows, valid, n = self._permutation
        sums = AllGatherVDispatcher._get_rsv_tensor()[:n]
        if sums.dtype == torch.float32:
            sums[:valid].zero_().index_add_(0, rows, hidden_states.float())
        else:
            total = torch.zeros(valid, sums.shape[1], dtype=torch.float32, device=sums.device)
            sums[:valid] = total.index_add_(0, rows, hidden_states.float())
        return sums

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Add up what the ranks give for each token: bfloat16 [T, H]. All ranks call this.

        Raises:
            EPError: See `AllGatherDispatcherBase.token_combine`.
        """
        return self._rows.token_combine(hidden_states)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """In the shape given to `dispatch_preprocess`, with what the shared experts gave added."""
        return self._rows.combine_postprocess(hidden_states)


def choices_of_map(routing_map: torch.Tensor, probs: torch.Tensor, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and probabilities of the experts that a map names.

    Args:
        routing_map: bool [T, E].
        probs: [T, E].
        choices: K, up to E.

    Returns:
        int64 [T, K], ascending, -1 where a token has fewer, the first K where it has more; float32 [T, K], 0 there.
    """
    experts = routing_map.shape[1]
    left = torch.arange(experts, 0, -1, device=routing_map.device)
    found = torch.where(routing_map, left, 0).topk(choices, 1).values
    there = found > 0
    chosen = probs.gather(1, torch.where(there, experts - found, 0)).float()
    return torch.where(there, experts - found, -1), torch.where(there, chosen, 0.0)


def check_settings(config: TransformerConfig, groups: ProcessGroupCollection) -> None:
    """Raise unless the dispatcher can do what a model is set to.

    Raises:
        UnsupportedError: A setting of `REFUSED` is on, a group of tensor parallelism has more than one rank, or the
            preprocessing is to be captured.
        DTypeError: The router computes in float64.
    """
    for name in ("tp", "expt_tp"):
        group = getattr(groups, name, None)
        if group is not None and group.size() > 1:
            raise UnsupportedError(
                "tensor parallelism beside this dispatcher",
                field=f"ranks of group {name}",
                value=group.size(),
                allowed="1",
                remedy="spread experts over ranks instead, or use Megatron-Core's own dispatcher",
            )
    for name, remedy in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise UnsupportedError(field=name, value=value, allowed="off", remedy=remedy)
    for name in ("cuda_graph_scope", "cuda_graph_modules"):
        scopes = getattr(config, name, None)
        parts = [scopes] if isinstance(scopes, str) else scopes or []
        if any(getattr(part, "name", part) == "moe_preprocess" for part in parts):
            raise UnsupportedError(
                "the preprocessing cannot be captured by itself",
                field=name,
                value=scopes,
                allowed="without moe_preprocess",
                remedy="capture the router alone (moe_router)",
            )
    if getattr(config, "moe_router_dtype", None) == "fp64":
        raise DTypeError(
            "probabilities travel as float32",
            field="moe_router_dtype",
            value="fp64",
            allowed="fp32 or None",
            remedy="set it to fp32",
        )
