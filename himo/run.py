"""Sets up a training run: data, model, optimizer and folder, for a new or a resumed run."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from himo import checkpoint, recipes, resume, run_folder, sharding, training_state
from himo.average import AverageWeights
from himo.config import TrainConfig
from himo.data import BatchLoader, EpochSampler, Sample, SampleIndex
from himo.device import usable_device
from himo.errors import HimoError, note
from himo.flags import as_arguments, flag
from himo.memory import free_memory
from himo.model import HiMoCLIP, named_config
from himo.objective import Objective
from himo.optimizer import learning_rate, make_optimizer
from himo.parallel import Ranks
from himo.precision import resolve
from himo.reporting import Reports, check_installed
from himo.training_data import open_data, training_loader, training_pairs
from himo.training_log import TrainingLog
from himo.training_state import State
from himo.transforms import Preprocess
from himo.validation import Best, Validation
from himo_kernels import extension


@dataclasses.dataclass
class TrainingRun:
    """The state of the training loop. Only rank 0 has a validation, a record and reports.

    Attributes:
        settings: the settings as used: precision on the device, and the choices of the recipe.
        sampler: the order of the samples, and the run's position in it.
        record: the output of `resume.record`; empty on other ranks.
        step: the number of steps done.
        steps_per_epoch: the number of steps in a whole epoch.
        total_steps: the value of step at the end of the run.
        average: the average of --ema, which is validated and saved as a model in place of the
            weights.
        rank_checked: whether R has been checked; each process checks it once.
    """

    settings: TrainConfig
    ranks: Ranks
    device: torch.device
    model: HiMoCLIP
    objective: Objective
    optimizer: torch.optim.AdamW
    sampler: EpochSampler
    loader: BatchLoader
    validation: Validation | None
    log: TrainingLog
    record: dict[str, Any]
    step: int
    steps_per_epoch: int
    total_steps: int
    average: AverageWeights | None = None
    best: Best = dataclasses.field(default_factory=Best)
    reports: Reports | None = None
    rank_checked: bool = False

    def batches(self) -> Iterator[Sample]:
        """Yields the remaining batches of the epoch, equally many on every rank."""
        # The last samples of an epoch may not reach every rank. A rank without samples gets an
        # empty batch, so it still takes part in the step.
        steps, number = self.sampler.global_batches(), 0
        for number, batch in enumerate(self.loader, 1):  # noqa: B007
            yield batch
        for _ in range(steps - number):
            size = self.model.visual.input_resolution
            none = torch.zeros(0, dtype=torch.int64)
            image = torch.zeros(0, 3, size, size, dtype=torch.uint8)
            tokens = torch.zeros(0, self.model.context_length, dtype=torch.int64)
            yield Sample(image, tokens, none, none)

    def save(self, *, ends_epoch: bool = False) -> None:
        """Writes the training state and deletes old ones; at an epoch's end also writes the model.

        Every rank must call it.

        Raises:
            HimoError: a loss or gradient since the last log line is not finite, or the files
                cannot be written.
        """
        self.log.check_finite(self.step)
        reasons = self._bad_samples()
        if ends_epoch:
            with self.whole_model() as model:
                if model is not None:
                    self.save_model(model, run_folder.model_name(self.sampler.epoch + 1))
        tensors = training_state.whole_tensors(
            self.model, self.optimizer, self.average, keep=self.ranks.main
        )
        if not self.ranks.main:
            return
        checkpoints = self.settings.folder / run_folder.CHECKPOINTS
        loop = {
            "sampler": self.sampler.state_dict(),
            "bad_samples": {"reasons": reasons},
            "best": dataclasses.asdict(self.best),
            "scaler": self.objective.scaler.state_dict(),
            **self.record,
        }
        training_state.save_state(checkpoints, self.step, tensors, loop)
        if keep := self.settings.keep_checkpoints:
            models = run_folder.saved_models(checkpoints, self.sampler.epoch + 1)
            for old in [*training_state.saved_states(checkpoints)[:-keep], *models[:-keep]]:
                old.unlink()

    def save_model(self, model: HiMoCLIP, name: str) -> None:
        """Writes the model, with the settings, to a file among the checkpoints."""
        path = self.settings.folder / run_folder.CHECKPOINTS / name
        training = {"step": self.step, **dataclasses.asdict(self.settings)}
        checkpoint.save(model, path, metadata={"training": training})

    @contextmanager
    def whole_model(self) -> Iterator[HiMoCLIP | None]:
        """The model that is validated and saved, for the body; None on ranks other than 0.

        Every rank must call it. With --ema it has the average for its weights, and the run must not
        train in the body.
        """
        if self.settings.fsdp:
            averages = {} if self.average is None else self.average.state_dict()
            yield sharding.whole_model(self.model, averages, keep=self.ranks.main)
        elif not self.ranks.main:
            yield None
        elif self.average is None:
            yield self.model
        else:
            with self.average.in_place():
                yield self.model

    def report_end(self) -> None:
        """Prints unreadable samples and the paths of the models. Every rank must call it."""
        self.loader.bad.load_state_dict({"reasons": self._bad_samples()})
        if not self.ranks.main:
            return
        if self.loader.bad.reasons:
            print(self.loader.bad.summary())
        folder = self.settings.folder
        checkpoints = folder / run_folder.CHECKPOINTS
        print(f"{folder}: done, {checkpoints / run_folder.model_name(self.sampler.epoch + 1)}")
        if self.best.step:
            print(f"{folder}: {self.best.description()}, {checkpoints / run_folder.BEST}")

    def _bad_samples(self) -> dict[int, str]:
        # Row and reason, from all ranks.
        states = self.ranks.gather(self.loader.bad.state_dict())
        return {row: reason for state in states for row, reason in state["reasons"].items()}


def open_run(settings: TrainConfig, ranks: Ranks) -> TrainingRun:
    """Sets up a new run, or resumes one from its checkpoint, and prints a summary.

    Raises:
        HimoError: bad data or settings, a damaged checkpoint, or a checkpoint of another run.
    """
    check_installed(settings)
    if settings.fsdp and ranks.size == 1:
        start = "torchrun --nproc_per_node 8 -m -- himo train ..."
        raise HimoError(f"--fsdp: expected several processes, as `{start}` starts them, got 1")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = usable_device(ranks.device(settings.device))
    given, state = settings, run_folder.saved_state(settings)
    if state is not None:
        with training_state.refuse_damage(state):
            settings = recipes.taken_up(settings, state.record["settings"])
    precision, said = resolve(settings.precision, device, ranks)
    settings = dataclasses.replace(settings, precision=precision)
    no_extension = extension.notice() if device.type == "cpu" else None
    for text in (said, no_extension):
        if text and ranks.main:
            note(text)
    if settings.model:
        named_config(settings.model)  # a wrong name is an error before the data are read
    with ranks.main_first():  # rank 0 writes the index, then the others read it
        index, held_out = open_data(settings, ranks)
    free = min(ranks.gather(free_memory(device)))  # before the model is built: step_bytes counts it
    settings = recipes.with_model(settings, len(index))
    model = build_model(settings, device)
    settings = recipes.with_schedule(
        settings, len(index), processes=ranks.size, config=model.config, free=free
    )
    with ranks.main_first():  # rank 0 writes the token cache
        pairs = training_pairs(settings, index, model.config)
    sampler = EpochSampler(
        len(pairs),
        settings.batch_size * settings.accum_freq,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        drop_last=not settings.keep_last_batch,
        reshuffle=not settings.same_order,
    )
    objective = Objective(model, settings, ranks)
    if settings.cuda_graph_head:  # before the loader's threads start: their calls end a capture
        objective.capture_head(sampler.batch_size, device)
    record = {}
    if ranks.main:
        val_data = held_out if settings.val_data is not None else None
        record = resume.record(settings, ranks.size, model.config, index, val_data)
    pairs_per_step = sampler.batch_size * ranks.size
    run = TrainingRun(
        settings,
        ranks,
        device,
        model,
        objective,
        make_optimizer(model, settings),
        sampler,
        training_loader(settings, pairs, sampler, pin_memory=device.type == "cuda"),
        _validation(settings, held_out, pairs.preprocess) if ranks.main else None,
        TrainingLog(settings.folder / run_folder.METRICS, pairs_per_step, ranks),
        record,
        step=0,
        steps_per_epoch=sampler.global_batches(),
        total_steps=0,
    )
    if settings.ema is not None:
        run.average = AverageWeights(model, settings.ema)
    changes = _restore(run, state)
    run.step = 0 if state is None else state.step
    # Steps done plus steps left, so that a run resumed with more --epochs gets the right total.
    epochs_left = settings.epochs - sampler.epoch - 1
    run.total_steps = run.step + sampler.global_batches() + run.steps_per_epoch * epochs_left
    _check_warmup(settings, run.total_steps)
    ranks.barrier()  # every rank has read the folder before rank 0 writes to it
    if ranks.main:
        choice = recipes.chosen(given, settings) if state is None else {}
        if not settings.dry_run:
            _open_folder(run, state, changes, choice)
        if settings.resume is not None and state is None:
            note(f"--resume {settings.resume}: no training state there yet, the run begins")
        if choice:
            flags = " ".join(as_arguments(choice))
            print(f"{settings.folder}: recipe {settings.recipe}: {flags}")
        _announce(run, len(pairs), pairs_per_step)
    return run


def _open_folder(
    run: TrainingRun, state: State | None, changes: list[resume.Change], choice: dict[str, Any]
) -> None:
    settings = run.settings
    run_folder.start(settings, state, changes, choice)
    run.log.recipe = {settings.recipe: choice} if choice else None
    if run.best.step and not run_folder.keeps_best(settings.folder, run.best.step):
        run.best = Best()
    run.reports = Reports(settings, run.step)


def _restore(run: TrainingRun, state: State | None) -> list[resume.Change]:
    # Restores the checkpoint, if there is one; returns the settings that differ from it.
    settings, sampler = run.settings, run.sampler
    changes: list[resume.Change] = []
    if state is not None:
        with training_state.refuse_damage(state):
            if run.ranks.main:
                changes = resume.check(state.record, run.record, settings.allowed, state.path)
            sampler.load_state_dict(state.record["sampler"])
            run.loader.bad.load_state_dict(state.record["bad_samples"])
            scaler = state.record.get("scaler")
            if scaler and run.objective.scaler.is_enabled():
                run.objective.scaler.load_state_dict(scaler)
            run.best = Best(**state.record.get("best", {}))
            training_state.restore(state, run.model, run.optimizer, run.average, run.device)
        if sampler.epoch >= settings.epochs:
            done = sampler.epoch + 1
            raise HimoError(
                f"--epochs: expected at least {done}, begun before, got {settings.epochs}"
            )
    return changes


def _check_warmup(settings: TrainConfig, total_steps: int) -> None:
    if settings.warmup >= total_steps and not settings.force_warmup:
        raise HimoError(
            f"--warmup: expected less than the {total_steps} steps of this run, got "
            f"{settings.warmup}: the learning rate would rise towards --lr {settings.lr:g} to the "
            "end; --force-warmup trains so"
        )


def _announce(run: TrainingRun, pairs: int, pairs_per_step: int) -> None:
    settings, total = run.settings, run.total_steps
    batch = recipes.other_batch(settings, pairs_per_step)
    for doubt in [*([batch] if batch else []), *recipes.doubts(settings, total)]:
        note(doubt)
    if settings.model is not None and settings.pretrained is not None:
        note(f"--model {settings.model} is not read: --pretrained decides its own")
    for name in ("exchange", "rank_timeout"):
        if run.ranks.size == 1 and getattr(settings, name) != getattr(TrainConfig, name):
            note(f"{flag(name)} changes nothing: the run has one process")
    left_out = pairs % pairs_per_step
    if left_out and not settings.keep_last_batch:
        note(
            f"{left_out} of {pairs} pairs are left out of an epoch, others each time: they do not "
            f"fill a step of {pairs_per_step}; --keep-last-batch trains on them too"
        )
    print(
        f"{settings.folder}: {pairs} pairs, {total} steps of {pairs_per_step}, "
        f"{settings.loss} loss, trains {trained_parameters(run.model)} on {run.device}"
        + (f", {run.ranks.size} processes" if run.ranks.size > 1 else "")
        + (f", {run.validation.description()}" if run.validation is not None else "")
    )
    if 0 < run.step < total:
        rate = learning_rate(run.step, total, settings)
        print(f"{settings.folder}: goes on after step {run.step}, at a learning rate of {rate:.3g}")


def trained_parameters(model: nn.Module) -> str:
    """How many parameters are trained, of how many: "7.5 M of 7.5 M parameters"."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, is_on in sizes if is_on), sum(size for size, _ in sizes)
    return f"{_counted(trained)} of {_counted(total)} parameters"


def _counted(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"


def _validation(
    settings: TrainConfig, held_out: SampleIndex | None, preprocess: Preprocess
) -> Validation | None:
    if held_out is None:
        return None
    return Validation(
        held_out,
        preprocess,
        batch_size=settings.batch_size,
        workers=settings.workers,
        max_bad_fraction=settings.max_bad_fraction,
        with_himo=settings.val_himo,
    )


def build_model(settings: TrainConfig, device: torch.device) -> HiMoCLIP:
    """Returns the model at step 0; raises HimoError for an unknown name or a bad checkpoint."""
    if settings.pretrained is not None:
        given = {name: getattr(settings, name) for name in checkpoint.CHOICES}
        model, _ = checkpoint.load(settings.pretrained, device="cpu", stretch=True, **given)
    else:
        model = HiMoCLIP(named_config(settings.model))
    if settings.log_scale is not None:
        nn.init.constant_(model.logit_scale, settings.log_scale)
    if settings.lock_image:
        model.lock_image_tower(settings.lock_image_unlocked_groups)
    if settings.lock_text:
        model.lock_text_tower(settings.lock_text_unlocked_layers)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    return model.to(device)
