"""A model whose routed experts wait in host memory, made ready to generate."""

import copy
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, Shaped, UInt

from moejax.devices import Team
from moejax.errors import UsageError
from moejax.offload import ExpertStore, SlotPlan
from moejax.qwen_moe import KVCache, Lookahead, QwenMoe, QwenMoeConfig, empty_cache
from moejax.strategies import CacheShape, Strategy, check_pool

from ._check import check_fit, check_generation, one_each
from ._decode import make_program, make_step, program_specs
from ._dense_model import DenseModel, choose_kernels, spread_model
from ._event import COUNTS, ReplayTable
from ._expert_cache import ExpertCache, OffloadState, make_replay_table, make_sizes
from ._expert_cache import empty_cache as empty_expert_cache
from ._generate import Generation
from ._programs import (
    Place,
    ProgramSettings,
    Routed,
    StepOutput,
    fill_up,
)
from ._sampling import GREEDY, Draw, Sampling, abstract_draw, make_draw
from ._stream import StreamedPrefill
from ._warm import WarmUp
from .kernels._copy import schedule
from .kernels._dense_weights import pack_dense

# Layers of Qwen1.5-MoE whose compute hides the copy of one expert, at a batch of one on an H100.
_LAYERS_PER_COPY = 5


class OffloadEngine:
    """Generates with the routed experts in host memory and some of them in slots on the device.

    A step is one program: it routes, decides which experts stay, fetches those that are missing,
    computes and chooses the next token without asking the host. Whatever the slots hold, the same
    program gives bit-identical logits.

    Several devices share the experts: each keeps, misses, fetches and computes its own, and
    decides by itself; everything else all compute alike. Once a layer their experts' answers are
    added: first each device's own in the order of their numbers, then the devices', then the
    residual stream. That order is all that distinguishes their logits from one device's.

    Args:
      model: The model without its routed experts: their parameters are arrays of size zero.
        Kernels stack its weights; `prepare_model` does it once for several engines and leaves
        no second copy.
      store: Those experts, and the devices that share them.
      plan: How many of them the device holds; each of several as many.
      strategy: Which of them; of several devices one for each, or the same for all. The devices
        run one program, the first one's `step`: what distinguishes theirs must be in their states.
      kernels: One of `KERNELS`.
      layers_per_copy: In the shadow of how many layers one expert is copied, where the strategy
        prefetches; more for a slow link or a small batch.

    Raises:
      UsageError: The kernels cannot run the model, or the parts do not fit each other.
    """

    def __init__(
        self,
        model: QwenMoe | DenseModel,
        store: ExpertStore,
        plan: SlotPlan,
        strategy: Strategy | Sequence[Strategy],
        *,
        kernels: str = "auto",
        layers_per_copy: int = _LAYERS_PER_COPY,
    ):
        self.config: QwenMoeConfig = model.config
        self.kernels = choose_kernels(kernels, model)
        self.plan, self._num_allocated = plan, plan.num_slots
        self.num_compiles = {"decode": 0}
        check_fit(model.config, store, plan)
        self._store, self._team = store, store.team
        self._strategies = one_each(strategy, self._team.num_devices)
        strategy = self._strategy = self._strategies[0]
        if plan.scope == "pool":
            check_pool(strategy.keeps_layers_apart)
        shape = CacheShape(
            len(self.config.moe_layers), self.config.num_experts, self.config.num_experts_per_tok, 1
        )
        self.schedule = schedule(store.layout.num_rows, layers_per_copy)
        self.sizes = make_sizes(
            shape, store.layout, plan.scope, strategy, self.schedule, self._team.num_devices
        )
        if isinstance(model, QwenMoe) and self.kernels != "xla":
            model = DenseModel(model.config, pack_dense(model))
        model = spread_model(model, self._team)
        self._prefill = StreamedPrefill(model, store.layers, team=self._team)
        # What reads the future has none here, and a pool's layers compete for the same slots.
        is_warm = plan.scope == "layer" and plan.num_slots > 0 and not strategy.reads_future
        self._warm_up = WarmUp(strategy, self.sizes, self._team) if is_warm else None
        self._graph: Any = None
        if isinstance(model, DenseModel):
            self._params: Any = model.weights
        else:
            self._graph, self._params = nnx.split(model)
        self._dtype = jnp.dtype(store.layout.dtype)
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes on each device that do not depend on the batch: dense weights and slots."""
        # A tied head is the embedding itself.
        dense = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(self._params)}
        slots = self._num_allocated * self._store.layout.expert_bytes
        return {"dense": sum(dense.values()), "slots": slots}

    def with_plan(self, plan: SlotPlan) -> "OffloadEngine":
        """The same programs with another plan, which may leave slots unused; nothing is compiled.

        Raises:
          UsageError: The plan is of another scope or model, or needs more slots than there are.
        """
        check_fit(self.config, self._store, plan)
        if plan.scope != self.plan.scope or plan.num_slots > self._num_allocated:
            raise UsageError(
                f"a plan of {plan.num_slots} slots ({plan.scope}) does not fit into "
                f"{self._num_allocated} ({self.plan.scope})",
                "Make an engine of this plan.",
            )
        other = copy.copy(self)
        other.plan = plan
        return other

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_token_ids: Collection[int] = (),
        record: bool = False,
        lookahead: Lookahead | None = None,
        first_request: int = 0,
    ) -> Generation:
        """Prepares one batch, like `Engine.generate`; prompts are read with streamed experts.

        Where layers have slots of their own, these hold what the strategy would keep had the
        prompts' last tokens been decoded, see `WarmUp`; a pool starts empty.

        Raises:
          UsageError: A prompt is empty, too long or holds what is no token, the strategy needs
            the future, or another argument is out of range.
        """
        self._refuse_oracle(is_replayed=False)
        arrays, settings = check_generation(
            self.config,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            record=record,
            lookahead=lookahead,
        )
        token_ids, num_tokens = fill_up(arrays, settings.num_tokens)
        draw = None
        if not sampling.is_greedy:
            draw = make_draw(sampling, seed, first_request, len(arrays))
            draw = self._team.place(draw, Team.ALIKE)
        start_s = time.perf_counter()
        num_before = self._num_programs()
        step = self._decode_program(settings, 1, is_replayed=False)
        self._prepare_prefill(settings)
        is_fresh = self._num_programs() > num_before
        compile_s = time.perf_counter() - start_s if is_fresh else 0.0
        counts: list[Array] = []

        def advance(cache: tuple[KVCache, ExpertCache], place: Place):
            state, output = step(OffloadState(cache[0], place, cache[1]), draw, None)
            output.counts.copy_to_host_async()
            counts.append(output.counts[0])
            return (state.kv, state.experts), state.place, output.routed

        return Generation(
            arrays,
            prefill=partial(self._begin, settings, token_ids, num_tokens, draw),
            decode=advance,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            compile_s=compile_s,
            num_ahead=1 if jax.default_backend() == "cpu" else 2,
            read_counts=lambda num_steps: self._stack(counts[:num_steps]),
        )

    def new_state(self, batch_size: int, num_positions: int, *, position: int = 0) -> OffloadState:
        """A state to measure from: no experts on the device, and an empty past.

        Args:
          batch_size: Requests.
          num_positions: Tokens that the cache of each has room for.
          position: Where each request stands; what is before it is all zeros.
        """
        row = jnp.full(batch_size, position, jnp.int32)
        kv = empty_cache(self.config, batch_size, num_positions, self._dtype)
        place = Place(jnp.zeros(batch_size, jnp.int32), row, jnp.zeros(batch_size, jnp.int32))
        kv, place = self._team.place((kv, place), Team.ALIKE)
        return OffloadState(kv, place, self._empty_experts())

    def program(
        self,
        batch_size: int,
        num_positions: int,
        *,
        num_steps: int = 1,
        is_replayed: bool = False,
        is_recording: bool = False,
    ) -> Callable[..., tuple[OffloadState, StepOutput]]:
        """A compiled decode program: `f(state, draw=None, table=None) -> (state, output)`.

        The state that goes in is used up.

        Args:
          batch_size: Requests.
          num_positions: Tokens that the cache of each has room for.
          num_steps: Steps that one call takes.
          is_replayed: Whether calls give a `ReplayTable`, which overrides the router.
          is_recording: Whether the routing of the last step is returned.

        Raises:
          UsageError: The strategy needs the future and nothing is replayed.
        """
        self._refuse_oracle(is_replayed)
        settings = ProgramSettings(
            batch_size=batch_size,
            num_tokens=1,
            num_positions=num_positions,
            is_greedy=True,
            is_recording=is_recording,
        )
        compiled = self._decode_program(settings, num_steps, is_replayed=is_replayed)

        def call(
            state: OffloadState, draw: Draw | None = None, table: ReplayTable | None = None
        ) -> tuple[OffloadState, StepOutput]:
            return compiled(state, draw, table)

        return call

    def read(
        self,
        settings: ProgramSettings,
        token_ids: Int32[np.ndarray, "batch tokens"],
        num_tokens: Int32[np.ndarray, " batch"],
        draw: Draw | None,
    ) -> tuple[KVCache, Place, Float[Array, "batch vocab"], Routed | None]:
        """Reads prompts, the experts streamed through the device; see `StreamedPrefill`."""
        return self._prefill(settings, token_ids, num_tokens, draw)

    def advance(
        self, settings: ProgramSettings, state: OffloadState, draw: Draw | None
    ) -> tuple[OffloadState, Int32[Array, " batch"], Routed | None]:
        """One decode step, for `serve`; the cache that goes in is used up.

        A place that is free takes the step too, and the experts of its token count as demanded.
        """
        step = self._decode_program(settings, 1, is_replayed=False)
        state, output = step(state, draw, None)
        return state, output.token_ids[0], output.routed

    def _stack(self, counts: list[Array]) -> Int32[np.ndarray, "steps device_layers counts"]:
        shape = (0, self.sizes.num_devices * self.sizes.shape.num_layers, len(COUNTS))
        return np.stack(jax.device_get(counts)) if counts else np.zeros(shape, np.int32)

    def _num_programs(self) -> int:
        users = [self, self._prefill, *([self._warm_up] if self._warm_up else [])]
        return sum(sum(user.num_compiles.values()) for user in users)

    def _begin(
        self,
        settings: ProgramSettings,
        token_ids: Int32[np.ndarray, "batch tokens"],
        num_tokens: Int32[np.ndarray, " batch"],
        draw: Draw | None,
    ) -> tuple[tuple[KVCache, ExpertCache], Place, Float[Array, "batch vocab"], Routed | None]:
        """Reads prompts and fills the slots meanwhile."""
        cache, on_layer, filling = self._empty_experts(), None, None
        if self._warm_up is not None:
            filling = self._warm_up.begin(settings, cache, num_tokens)
            on_layer = filling.on_layer
        kv, place, logits, routed = self._prefill(
            settings, token_ids, num_tokens, draw, on_layer=on_layer
        )
        return (kv, cache if filling is None else filling.finish()), place, logits, routed

    def _prepare_prefill(self, settings: ProgramSettings) -> None:
        self._prefill.prepare(settings)
        if self._warm_up is not None:
            cache = jax.eval_shape(self._empty_experts)
            shapes = self._team.shapes((cache, self._store.layers[0]), Team.OWN)
            self._warm_up.prepare(settings, *shapes)

    def replay_table(
        self,
        experts: UInt[np.ndarray, "steps layers places_topk"],
        batch_size: int,
        *,
        lookahead: Shaped[np.ndarray, "steps layers depth experts"] | None = None,
    ) -> ReplayTable:
        """Recorded routing for `program`; see `make_replay_table`.

        Raises:
          UsageError: The routing has other layers or experts than the model.
        """
        table = make_replay_table(
            self.sizes, experts, batch_size, self._num_columns(batch_size), lookahead=lookahead
        )
        place = self._team.place
        own = table._replace(experts=None)
        return place(own, Team.OWN)._replace(experts=place(table.experts, Team.ALIKE))

    def _decode_program(
        self, settings: ProgramSettings, num_steps: int, *, is_replayed: bool
    ) -> Callable[..., tuple[OffloadState, StepOutput]]:
        settings = settings._replace(num_tokens=1)
        key = (settings, num_steps, is_replayed)
        if key in self._programs:
            return self._programs[key]
        step = make_step(
            self.config, self.kernels, self._graph, self._strategy, self.sizes, settings
        )

        take_steps = make_program(self.config, step, settings, num_steps)

        def program(*arguments):
            self.num_compiles["decode"] += 1
            return take_steps(*arguments)

        spread = self._team.run(program, *program_specs(is_replayed=is_replayed))
        # The host reads tokens when later steps are under way, so places are not given away.
        jitted = jax.jit(spread, donate_argnums=(2, 4))
        compiled: dict[Any, Callable[..., Any]] = {}

        def compile_for(table: ReplayTable | None) -> Callable[..., Any]:
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(table))
            if shapes not in compiled:
                rows = settings.batch_size
                state = jax.eval_shape(lambda: self.new_state(rows, settings.num_positions))
                kv, place = self._team.shapes((state.kv, state.place), Team.ALIKE)
                experts = self._team.shapes(state.experts, Team.OWN)
                draw = None if settings.is_greedy else abstract_draw(rows)
                draw = self._team.shapes(draw, Team.ALIKE)
                lowered = jitted.lower(
                    self._params, self._store.layers, kv, place, experts, draw, table
                )
                compiled[shapes] = lowered.compile()
            return compiled[shapes]

        if not is_replayed:
            compile_for(None)

        def call(state: OffloadState, draw: Draw | None, table: ReplayTable | None):
            run = compile_for(table)
            return run(self._params, self._store.layers, *state, draw, table)

        self._programs[key] = call
        return call

    def _empty_experts(self) -> ExpertCache:
        return empty_expert_cache(
            self.sizes,
            self._store.layout,
            self.plan,
            self._strategies,
            self._dtype,
            num_allocated=self._num_allocated,
            team=self._team,
        )

    def _num_columns(self, batch_size: int) -> int:
        return batch_size if batch_size == 1 or self.kernels == "xla" else 16

    def _refuse_oracle(self, is_replayed: bool) -> None:
        if self.sizes.reads_future and not is_replayed:
            raise UsageError(
                "the oracle knows the future only where recorded routing is replayed",
                "Replay a trace, or use another strategy.",
            )
