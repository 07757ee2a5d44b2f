"""One optimizer step: the only implementation, shared by `train`, the demo and every benchmark.

    batch -> [ micro-batch: noise, text, UNet, loss, backward ] x n -> gradient norm -> one launch per component -> StepResult

The step never reads a device value.  Loss, gradient norm and the count of skipped steps stay on the device until the log needs
them.  Values that change from step to step, such as lr, are written to the device.  So the whole step can be a CUDA graph.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastsd.config.stages import COMPONENTS, StageTable
from fastsd.data.loader import Batch
from fastsd.errors import out_of_memory
from fastsd.model.model import Model
from fastsd.model.select import selected
from fastsd.train.averages import PowerDecays
from fastsd.train.checksums import bit_sum
from fastsd.train.flow import Teacher, objective_of
from fastsd.train.gradient_sums import GradientSums
from fastsd.train.graph import CaptureFailed, Graphs
from fastsd.train.memory import count_failed_allocations
from fastsd.train.optim import FastOptimizer, flat_state, load_flat_state, optimizer_class
from fastsd.train.ranks import ALONE, Ranks, RanksOutOfMemory
from fastsd.train.schedule import ema_decay, learning_rate
from fastsd.train.sharded_updates import ShardedUpdates
from fastsd.train.step_inputs import StepInputs, fingerprints
from fastsd.train.trainable import FusedUpdates, TrainableComponent
from fastsd_kernels.gradient_norm import clip_scale


@dataclass(frozen=True)
class StepResult:
    """The results of a step, as 0-dim device tensors."""

    loss: Tensor  # mean over the batch
    grad_norm: Tensor  # before clipping
    skipped: Tensor  # number of steps so far that were skipped, in full or for elements whose update was not finite


class Step:
    """The forward, backward and update of a stage.

    Args:
        model: an fp32 model on the training device.
        stage: the stage to train.
        total: optimizer steps of the stage, for the schedule.
        seed: seed of noise and timesteps.
        micro_batch_size: images per forward; None = `stage.micro_batch_size`.
        graph: capture the step as a CUDA graph, one per batch size. The results are the same.
        cached_text: True if batches contain text embeddings. The step then does not use the text encoder.
        carried_steps: number of steps in earlier stages whose optimizer state and EMA this stage continues.
        ranks: the ranks that share each batch. Batches contain this rank's images only.
        teacher: the base's flow. A stage with a teacher cannot train without it.
        warn: called with a line of text to warn the user.
        evaluates_only: keep weights and averages only, to evaluate them. The step cannot train, and needs a fraction of the
            memory.

    Attributes:
        components: all components of the step by name. Those that the stage trains also have an entry in `optimizers`.
        canary_errors: number of steps whose gradients were computed twice and differed, 0-dim int64 on the device.
        images: images of a batch that this rank trains on.
        sharded: True if each rank keeps the optimizer state and EMA of its share of the weights only.
        micro_batch_size: images per forward, a divisor of `images`. When memory runs out on a rank, it becomes the next smaller
            one on all.
    """

    def __init__(
        self,
        model: Model,
        stage: StageTable,
        total: int,
        seed: int,
        micro_batch_size: int | None = None,
        *,
        graph: bool = False,
        cached_text: bool = False,
        carried_steps: int = 0,
        ranks: Ranks = ALONE,
        teacher: Teacher | None = None,
        warn: Callable[[str], None] = print,
        evaluates_only: bool = False,
    ) -> None:
        self.model, self.stage, self.total, self.carried_steps, self.warn = model, stage, total, carried_steps, warn
        self.trained = selected(model, stage.train, f"stage {stage.name!r}: train")
        self.ranks, self.images = ranks, ranks.share(stage.batch)
        size = micro_batch_size or stage.micro_batch_size
        self.micro_batch_size = size if ranks.world == 1 else max(n for n in range(1, size + 1) if self.images % n == 0)
        self.device = model.unet.conv_in.weight.device
        self.ops = model.unet.ops
        names = [name for name in COMPONENTS if not (cached_text and name == "text_encoder")]
        self.components = {name: self._component(name, arena=not (evaluates_only or stage.fused_backward)) for name in names}

        # Values that change from step to step lie on the device, where a captured step reads them.
        self.lrs: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in self.trained}
        self.ema_decay = torch.zeros((), dtype=torch.float64, device=self.device)
        self.powers = PowerDecays(stage.sigma_rel, self.device) if stage.sigma_rel else None
        self.frozen = torch.zeros((), dtype=torch.bool, device=self.device)
        updated = [] if evaluates_only else list(self.trained)
        self.optimizers: dict[str, FastOptimizer] = {name: self._optimizer(name) for name in updated}
        self.objective = objective_of(model.scheduler, seed, self.ops, stage, self.device)
        self.teacher = teacher
        if teacher:
            teacher.share(self.components["unet"])
        self.skipped, self.canary_errors = torch.zeros((), device=self.device), torch.zeros((), device=self.device).long()
        self._arenas = [component.gradients for component in self.components.values() if component.gradients]
        self._fused: FusedUpdates | None = None
        if stage.fused_backward:
            layouts = {name: self.components[name].layout for name in updated}
            self._fused = FusedUpdates(self.ops, self.optimizers, layouts)
            for name in updated:
                self.components[name].send_gradients(partial(self._fused.receive, name))

        shared = {name: self.components[name] for name in updated} if ranks.world > 1 else {}
        self._sums = GradientSums(ranks, list(shared.values())) if shared else None
        self._shards = ShardedUpdates(ranks, shared) if shared and stage.shard_state else None
        self.sharded = self._shards is not None
        self._workspace_missed = False  # True once fused updates have used what cuDNN computed without its workspace
        self._weights_touched = False  # True once the current step may have changed weights; a capture executes nothing
        self._graphs = Graphs(ranks, warn) if graph and self.device.type == "cuda" else None

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """Train on one batch as step number `step` (from 0) of the stage."""
        assert (batch.text_embeds_BLD is None) == ("text_encoder" in self.components)
        for component in self.components.values():
            component.drop_collected()
        assert self.teacher is not None or not self.stage.teacher
        run = self._compute if self._graphs is None else partial(self._graphs, self._compute)
        while True:
            self._weights_touched = False
            if self._graphs:
                self._graphs.replayed = False
            try:
                self._write_settings(step)
                inputs = StepInputs.of(batch, self.objective.timesteps(batch.positions_B), self.device)
                checksum = self._compute_gradients_once(inputs) if self._has_canary(step) else None
                result = StepResult(*run(*inputs))
                if checksum is not None:  # the step has only read its gradients
                    differs = self._checksum() != checksum
                    self.canary_errors += self._shards.any_rank(differs) if self._shards else differs
                return result
            except Exception as error:
                problem, shared = out_of_memory(error), isinstance(error, RanksOutOfMemory)
                if problem is None and not isinstance(error, CaptureFailed):
                    raise
            # Here the error is gone, and with it the activations that its traceback refers to.
            self._discard_step()
            if problem is not None:
                self._reduce_micro_batch(problem, shared=shared)

    def _has_canary(self, step: int) -> bool:
        return self.stage.canary_every > 0 and (step + 1) % self.stage.canary_every == 0

    def _compute_gradients_once(self, inputs: StepInputs) -> Tensor:
        """Compute a step's gradients, which the step will overwrite with the same bits, and return their checksum.

        On a GPU they have a graph of their own in the memory of the step's graphs: activations of eager calls would lie beside
        that memory. The last argument tells the two graphs apart.
        """
        if self._graphs is None:
            return self._gradients_checksum(*inputs, None)[0]
        (checksum,) = self._graphs(self._gradients_checksum, *inputs, None)
        self._graphs.replayed = False  # no weight has changed
        return checksum

    def _gradients_checksum(self, *inputs: Tensor | None) -> tuple[Tensor]:
        self._accumulate(StepInputs._make(inputs[:-1]))
        return (self._checksum(),)

    def _checksum(self) -> Tensor:
        """Add the bits of all gradients."""
        return bit_sum([arena.flat for arena in self._arenas])

    def _write_settings(self, step: int) -> None:
        """Write the values that change from step to step to the device."""
        for name, lr in self.lrs.items():
            lr.fill_(learning_rate(self.stage, step, self.total, name))
        if isinstance(self.stage.ema, float) and self.stage.ema:
            self.ema_decay.fill_(ema_decay(self.stage, self.carried_steps + step))
        if self.powers:
            self.powers.number(self.carried_steps + step)
        if self.stage.freeze_d_after:
            self.frozen.fill_(step >= self.stage.freeze_d_after)

    def _compute(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run one step with the fields of `StepInputs`, without waiting for the device or reading from it.

        Returns (loss, gradient norm, number of steps skipped).
        """
        if self.powers:
            self.powers.begin()
        loss = self._accumulate(StepInputs._make(inputs))
        if self._fused:
            # Every parameter was already updated when its gradient arrived.
            norm, found_inf = torch.stack(self._fused.norms).norm(), self._fused.found_inf
        else:
            # A gradient that is not finite must not reach any state: if `found_inf` is set, the optimizers change no byte.
            gradients = {name: self._gradients(name) for name in self.optimizers}
            merge = self._shards.all_sums if self._shards else None
            norm, found_inf = self.ops.gradient_norm([g for tensors in gradients.values() for g in tensors], merge=merge)
            scale = clip_scale(norm, self.stage.grad_clip) if self.stage.grad_clip else None
            self._touch_weights()
            for name, optimizer in self.optimizers.items():
                optimizer.update(*gradients[name], found_inf=found_inf, scale=scale)
            if self._shards:
                loss = self._shards.finish(loss, self.optimizers)

        overflows = [optimizer.finish(found_inf=found_inf) for optimizer in self.optimizers.values()]
        self.skipped += torch.stack([found_inf, *overflows]).any()
        if self.powers:
            self.powers.end(found_inf)
        return loss, norm, self.skipped.clone()

    def _accumulate(self, inputs: StepInputs) -> Tensor:
        """Accumulate the gradients of the batch's mean loss, of all ranks, and return that loss.

        Raises:
            RanksOutOfMemory: memory has run out on a rank. All ranks raise it, and no weight has changed.
        """
        if self._sums is None or (self._graphs and self._graphs.capturing):  # whose end the ranks agree on
            return self._accumulate_share(inputs)
        problem: str | None = None
        try:
            loss = self._accumulate_share(inputs)
        except Exception as error:
            problem = out_of_memory(error)
            if problem is None:
                raise
        if problem is not None:  # and the activations are gone, to which the error's traceback refers
            self._sums.abandon()
        self.ranks.memory_is_enough(problem)
        return loss

    def _accumulate_share(self, inputs: StepInputs) -> Tensor:
        """Accumulate the gradients of this rank's images, one micro-batch at a time, and sum them over the ranks."""
        images_here = len(inputs.positions_B)
        count = images_here * self.ranks.world
        total = torch.zeros((), device=self.device)
        failed_allocations = count_failed_allocations(self.device)
        if self._sums:
            self._sums.discard()
        for arena in self._arenas:
            arena.begin()
        for start in range(0, images_here, self.micro_batch_size):
            images = inputs.micro_batch(slice(start, start + self.micro_batch_size))
            latents = self.model.vae.scale(images.latents_BCHW.float())
            noisy, t_B, target = self.objective.add_noise(latents, images.positions_B, images.t_B)
            text_embeds = images.text_embeds_BLD
            if images.token_ids_BL is not None:
                with torch.set_grad_enabled("text_encoder" in self.optimizers):
                    text_embeds = self.model.text.encode(images.token_ids_BL)
            mask_B1HW = None if images.mask_B1HW is None else images.mask_B1HW / 255
            if self.teacher and text_embeds is not None:
                target = torch.lerp(target, self.teacher(noisy, t_B, text_embeds), self.stage.teacher_share)
            prediction = self.model.unet(noisy, t_B, text_embeds)
            loss = self.objective.loss(prediction, target, t_B, images.weight_B, mask_B1HW) * (len(latents) / count)
            if self._fused:
                self._touch_weights()
                self._fused.begin(loss.detach())
            if self._sums and start + self.micro_batch_size >= images_here:
                self._sums.begin()
            loss.backward()
            total += loss.detach()
        if count_failed_allocations(self.device) > failed_allocations:
            # cuDNN takes an algorithm with a smaller workspace then, which rounds differently, and says nothing.
            if not self._fused:
                raise torch.OutOfMemoryError("cuDNN has no memory for the workspace of its algorithm")
            if not self._workspace_missed:
                self.warn("cuDNN has no memory for the workspace of its algorithm: a resumed run may differ in the last bits")
            self._workspace_missed = True
        return self._sums.finish(total) if self._sums else total

    def _touch_weights(self) -> None:
        self._weights_touched = self._graphs is None or not self._graphs.capturing

    def _gradients(self, name: str) -> list[Tensor]:
        """Return the gradients of what this rank updates of a component."""
        arena = self.components[name].gradients
        assert arena is not None
        return self.components[name].pieces(arena.flat)

    def _reduce_micro_batch(self, reason: str, *, shared: bool = False) -> None:
        """Continue with a smaller micro-batch. Raises UserError if none is left or weights may have changed.

        Args:
            shared: True if all ranks do so.
        """
        smaller_sizes = [n for n in range(1, self.micro_batch_size) if self.images % n == 0]
        if self._weights_touched or (self._graphs and self._graphs.replayed):
            raise self.ranks.memory_error("while weights were updated", reason)
        if self._fused:
            raise self.ranks.memory_error("with fused_backward, which cannot split the batch", reason)
        if self.ranks.world > 1 and not shared:
            raise self.ranks.memory_error(f"on rank {self.ranks.rank}, with micro-batch {self.micro_batch_size}", reason)
        if not smaller_sizes:
            raise self.ranks.memory_error("even with one image per forward", reason)
        self.warn(
            f"out of memory with {self.micro_batch_size} images per forward: continuing with {smaller_sizes[-1]}, batch stays "
            f"{self.stage.batch}; set micro_batch = {smaller_sizes[-1]} to use this from the start"
        )
        self.micro_batch_size = smaller_sizes[-1]
        try:
            for arena in self._arenas:
                arena.widen()
        except Exception as error:
            problem = out_of_memory(error)
            if problem is None:
                raise
            raise self.ranks.memory_error("for gradients in fp32", problem) from None

    def _discard_step(self) -> None:
        """Discard an unfinished step and free its memory."""
        for optimizer in self.optimizers.values():
            optimizer.discard_updates()
        for component in self.components.values():
            for weight in component.weights:
                weight.grad = None
        gc.collect()  # what the error's traceback referred to, if it was part of a cycle
        self.free_graphs()
        if self._graphs:
            self._graphs.forget()

    def free_graphs(self) -> None:
        """Free the memory of captured steps. They are captured again when they are needed."""
        if self._graphs:
            self._graphs.free()
        elif self.device.type == "cuda":
            torch.cuda.empty_cache()

    def d(self) -> dict[str, Tensor]:
        """Return the step size d by component, 0-dim on the device. Empty if the optimizer does not tune its lr."""
        return {name: optimizer.step_size for name, optimizer in self.optimizers.items() if optimizer.step_size is not None}

    def state_dict(self, *, optimizers: bool = True) -> dict[str, Tensor]:
        """Return the state for a checkpoint: of the optimizers ("COMPONENT|KEY"), steps skipped, EMA ("COMPONENT@AVERAGE/KEY").

        Power-function averages also have their counts ("AVERAGE@steps", "AVERAGE@start").  With sharded state, all ranks call
        this together. Rank 0 receives all of it in main memory, as of a step without shards, and so do the components, until
        the next step. The others receive tensors without data.
        """
        for component in self.components.values():
            component.collect_lows()
        state = {"skipped": self.skipped} if optimizers else {}
        for name, optimizer in self.optimizers.items() if optimizers else ():
            component = self.components[name]
            whole = {"whole": component.shards.whole} if component.shards else {}
            tensors = flat_state(optimizer, component.names, component.layout.views, **whole)
            state |= {f"{name}|{key}": tensor for key, tensor in tensors.items()}
        return state | self.average_state()

    def average_state(self) -> dict[str, Tensor]:
        """Return what `state_dict` has of the averages, without the rest. With sharded state, all ranks call this together."""
        state = self.powers.state(self.stage.averages) if self.powers else {}
        for name, component in self.components.items():
            component.collect_averages()
            state |= {f"{name}@{key}": tensor for key, tensor in component.ema_state().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state bit by bit. Without EMA weights in `state`, those of the step stay as they are."""
        self.skipped.copy_(state["skipped"])
        for name, optimizer in self.optimizers.items():
            component = self.components[name]
            tensors = {key.removeprefix(f"{name}|"): state[key] for key in state if key.startswith(f"{name}|")}
            if component.shards:
                load_flat_state(optimizer, component.names, tensors, component.layout.without_data, component.write_pieces)
            else:
                load_flat_state(optimizer, component.names, tensors, component.layout.views)
        self.load_averages(state)

    def load_averages(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages. Those which are not in `state`, because they were enabled only now, stay as they are."""
        for key, counts in self.powers.state(self.stage.averages).items() if self.powers else ():
            if key in state:
                counts.copy_(state[key])
        for k, average in enumerate(self.stage.averages):
            if self.powers and f"{average}@steps" in state:
                self.powers.continues(k)
            for name, component in self.components.items():
                for i, parameter in enumerate(component.names):
                    if (key := f"{name}@{average}/{parameter}") in state:
                        component.load_average(k, i, state[key])

    def collect_averages(self) -> None:
        """With sharded state, give the EMA of each component to all ranks, until the next step. All ranks must call this."""
        for component in self.components.values():
            component.collect_averages(everywhere=True)

    def weights_checksum(self) -> int:
        """Add the bits of all trained weights (high halves in bf16), the same on all ranks. Waits for the device."""
        halves = [(c.master_hi, None if c.shards else c.master_lo) for c in self.components.values()]
        return int(bit_sum([half for pair in halves for half in pair if half is not None]))

    def batch_fingerprints(self, batch: Batch) -> dict[str, str]:
        """Hash the inputs of a step as in `step_inputs.fingerprints`."""
        return fingerprints(batch, self.objective, self.ranks)

    def tensors_by_role(self) -> dict[str, list[Tensor]]:
        """Return the device tensors that live as long as the stage, by role."""
        tensors_by_role: dict[str, list[Tensor]] = {"weights": [], "gradients": [], "state": [], "ema": []}
        tensors_by_role |= {"teacher": self.teacher.copied} if self.teacher else {}
        for component in self.components.values():
            for role, tensors in component.tensors_by_role().items():
                tensors_by_role[role] += tensors
        for optimizer in self.optimizers.values():
            tensors_by_role["state"] += [tensor for state in optimizer.state.values() for tensor in state.values()]
        return tensors_by_role

    def release(self) -> None:
        """End the stage and restore the model's exact fp32 weights."""
        for component in self.components.values():
            component.release()

    def _component(self, name: str, *, arena: bool) -> TrainableComponent:
        stage = self.stage
        args = name, self.model.component(name), self.trained.get(name, set()), stage.precision
        accumulates = stage.batch > self.micro_batch_size  # also over ranks
        sharing = self.ranks if stage.shard_state and self.ranks.world > 1 else None
        return TrainableComponent(*args, accumulates=accumulates, arena=arena, averages=stage.averages, sharing=sharing)

    def _optimizer(self, name: str) -> FastOptimizer:
        stage, implementation = self.stage, optimizer_class(self.stage.optimizer)
        # The hyper-parameters are the stage keys that the class has as parameters. Those without a value keep its defaults.
        parameters = inspect.signature(implementation).parameters
        values = {key: getattr(stage, key) for key in StageTable.model_fields if key in parameters}
        settings = {key: value for key, value in values.items() if value is not None}
        settings |= {"lr": stage.rate_of(name), "ops": self.ops}
        optimizer = self.components[name].optimize(partial(implementation, **settings))
        (group,) = optimizer.param_groups
        group["lr"] = self.lrs[name]
        decay = self.ema_decay if stage.ema_power or stage.ema_after else stage.ema
        group["ema_decay"] = self.powers.decays_K if self.powers else decay
        if stage.freeze_d_after:
            optimizer.frozen = self.frozen
        return optimizer
