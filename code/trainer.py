"""The training loop: optimiser, schedule, EMA, logging, checkpoints. The forward pass and the loss are in distiller.py."""
import copy
import logging
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import evaluation
import published
import resume
from checkpoint import Experiment
from data import Crops, Images, make_batches
from distiller import Distiller
from loss import concatenate
from model.lora import merged, merged_parameters
from perceptual import PerceptualMetric
from schedule import learning_rate, make_optimizer
from system import distributed
from system.errors import UserError
from system.logger import redraw_interval
from system.memory_budget import retain_freed_memory
from system.signals import Interruption
from tensorboard_log import IMAGE_SIDE, TensorBoard

log = logging.getLogger("sr")


class Trainer:
    """Train the student of a `Distiller` for --epochs epochs of --test_every iterations, each followed by a test."""

    def __init__(self, args: Namespace, distiller: Distiller, crops: Crops, benchmarks: list[Images], experiment: Experiment,
                 device: torch.device, metrics: Sequence[PerceptualMetric] = ()):
        self.args, self.experiment, self.device = args, experiment, device
        self.crops, self.benchmarks, self.metrics = crops, benchmarks, metrics
        self.distiller = distiller.to(device, memory_format=torch.channels_last)
        self.student, self.loss = distiller.student, distiller.loss
        self.parallel = distiller  # wrapped in `fit`, which all ranks call at the same time; rank 0 builds its trainer first
        self.optimizer = make_optimizer(args, distiller.trainable_parameters())
        self.ema = copy.deepcopy(merged(self.student)).eval().requires_grad_(False) if args.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "half")
        self.iteration, self.iterations = 0, args.epochs * args.test_every
        self.seconds = 0.0  # time of the training so far, without tests
        self.history = []  # a dict for each epoch, from which the CSV files and curves are written
        self.sums = torch.zeros(len(self.loss.names), dtype=torch.float64, device=device)  # of the terms, in this epoch
        # of each term: the sum of its gradient norms over the logged iterations of this epoch, and their number
        self.gradients = torch.zeros(2, len(self.loss.names), dtype=torch.float64, device=device)
        self.board = None  # the TensorBoard of rank 0, opened by `fit`
        self.last_lr = None  # LR images of the last batch, with which the weights are checked before they are saved
        if experiment.state is not None:
            resume.load_state(self, experiment.state, experiment.folder / "state.pt")
            experiment.state = None  # frees the memory

    def fit(self) -> int:
        """Train until --epochs epochs are done and tested; return the exit status of the process."""
        args = self.args
        if self.finished():
            log.info("the run is finished: --epochs %d are done", args.epochs)
        self.parallel = distributed.wrap(self.distiller)
        if args.compile:
            self.distiller.compile_networks(args.batch_size // (distributed.world_size() * args.split_batch),
                                            args.patch_size // args.scale)
        if args.tensorboard and not distributed.rank():
            untested = self.iteration == (len(self.history) + 1) * args.test_every  # stopped before the test of an epoch
            self.board = TensorBoard(self.experiment.folder / "tensorboard", self.iteration + (not untested))
        with Interruption() as self.interruption, retain_freed_memory(self.device):
            batches = iter(make_batches(args, self.crops, self.iteration, self.iterations, self.device.type == "cuda"))
            while not self.finished() and not self.interrupted():
                if self.train_epoch(batches):
                    self.test_epoch()
            status = self.interrupted()
            if status:
                self.save_state()
                log.info("stopped at iteration %d; %s", self.iteration, "the run is finished" if self.finished() else
                         "the same command with --resume 1 continues")
            del batches  # ends its workers while Ctrl-C is handled
        if self.board:
            self.board.close()
        return status

    def finished(self) -> bool:
        """Return whether all epochs are done and tested."""
        return len(self.history) >= self.args.epochs

    def interrupted(self) -> int:
        """Return the exit status for a signal that any of the processes has received, else 0."""
        return distributed.all_reduce_max(self.interruption.status or (128 + signal.SIGTERM) * distributed.launcher_died())

    def train_epoch(self, batches: Iterator) -> bool:
        """Train to the end of the epoch, which may have begun before a resume; return False if a signal interrupts it."""
        args, start, end = self.args, self.iteration, (len(self.history) + 1) * self.args.test_every
        self.distiller.train()
        began = saved = ended = time.monotonic()
        waited, printed = 0.0, start
        with bar(f"epoch {len(self.history) + 1}/{args.epochs}", end - args.test_every, start, end) as progress:
            while self.iteration < end:
                requested = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - requested
                values = self.step(*batch)
                self.sums += values
                self.iteration += 1
                started, ended = ended, time.monotonic()
                self.seconds += ended - started
                if self.iteration % args.print_every == 0 or self.iteration == end:
                    self.check_loss()
                    now = time.monotonic()
                    log.info("[%d/%d] %s  %.2f it/s, waiting for data %.1f %%", self.iteration, self.iterations,
                             format_terms(*self.mean_loss()),
                             (self.iteration - printed) / (now - began), 100 * waited / (now - began))
                    if self.board and self.iteration != end:
                        self.board.add(self.iteration, self.loss_scalars(*self.mean_loss()), {})
                    progress.set_postfix_str(format_terms(*self.loss_of(values)), refresh=False)
                    began, waited, printed = now, 0.0, self.iteration
                elif self.device.type == "cpu":  # on a GPU this would synchronise in every iteration
                    self.check_loss()
                progress.update()
                if self.interrupted():
                    return False
                if time.monotonic() - saved >= args.save_every:
                    self.save_state()
                    saved = time.monotonic()
        self.save_state()
        return True

    def loss_of(self, values: torch.Tensor) -> tuple[float, dict[str, float]]:
        """Return the sum of the values of the terms, and each value."""
        values = values.tolist()
        return sum(values), dict(zip(self.loss.names, values))

    def mean_loss(self) -> tuple[float, dict[str, float]]:
        """Return the mean of the loss over the epoch so far, and of each term over the iterations of its stages."""
        start = self.history[-1]["iteration"] if self.history else 0
        total, means = 0, {}
        for name, value in self.loss_of(self.sums)[1].items():
            count = self.loss.count(name, start, self.iteration)
            if count:
                means[name] = value / count
                total += means[name] * (count / (self.iteration - start))
        return total, means

    def loss_scalars(self, total: float, means: dict[str, float]) -> dict[str, float]:
        """Return the curves of TensorBoard that are written while an epoch is trained: loss, terms, learning rate."""
        return {"loss/total": total, **{f"loss/{name}": value for name, value in means.items()},
                "lr": learning_rate(self.args, self.iteration - 1)}

    def add_test_to_board(self, row: dict, upscale: Callable[[np.ndarray], np.ndarray]) -> None:
        """Write the scores of an epoch of the history and an SR image of each test set to TensorBoard."""
        scalars = self.loss_scalars(row["total"], row["loss"])
        for name, (psnr, ssim) in row["scores"].items():
            others = row.get("perceptual", {}).get(name, {})
            scalars |= {f"{metric}/{name}": value for metric, value in {"PSNR": psnr, "SSIM": ssim, **others}.items()}
        crops = {}
        for images in self.benchmarks:
            lr, side = images.lr(0), IMAGE_SIDE // images.scale
            top, left = (max(size - side, 0) // 2 for size in lr.shape[:2])
            crops[f"SR/{images.name}"] = evaluation.upscale_image(upscale, images, 0, lr[top:top + side, left:left + side])
        self.board.add(row["iteration"], scalars, crops)

    def step(self, lr: torch.Tensor, hr: torch.Tensor, teacher_outputs: torch.Tensor | None = None) -> torch.Tensor:
        """Update the student once, given a batch of `make_batches`; return the weighted values of the terms."""
        parts, every = self.args.split_batch, self.args.log_gradients
        logs_gradients = every > 0 and (self.iteration + 1) % every == 0
        inputs, values = [], 0
        self.optimizer.zero_grad(set_to_none=True)
        for index, part in enumerate(zip(*(x.chunk(parts) for x in (lr, hr, teacher_outputs) if x is not None))):
            with nullcontext() if index + 1 == parts or self.parallel is self.distiller else self.parallel.no_sync():
                total, part_values, part_inputs = self.parallel(*part, iteration=self.iteration,
                                                                log_gradients=logs_gradients)
                self.scaler.scale(total / parts).backward()
            values = values + part_values / parts
            inputs.append(part_inputs)
        inputs = concatenate(inputs)
        self.last_lr = inputs.lr
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args, self.iteration)
        if self.args.gclip or self.args.grad_norm:
            self.scaler.unscale_(self.optimizer)
        if self.args.gclip:
            torch.nn.utils.clip_grad_value_(self.student.parameters(), self.args.gclip)
        if self.args.grad_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.args.grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.update_ema()
        self.loss.update(replace(inputs, ema_student=self.ema or self.student))
        values = distributed.all_reduce_mean(values)
        if logs_gradients:
            values, squares = values
            self.add_gradients((squares / (parts * distributed.world_size())).sqrt())
        return values

    def add_gradients(self, norms: torch.Tensor) -> None:
        """Add the gradient norms of the terms to the sums of the epoch.

        Norms that are not finite are left out: --precision half skips such an update, and otherwise the run ends.
        """
        if norms.isfinite().all():
            weights = self.loss.weights_at(self.iteration)
            self.gradients += torch.stack([norms, norms.new_tensor([name in weights for name in self.loss.names])])

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the exponential moving average of the student, with the decay --ema."""
        torch._foreach_lerp_(list(self.ema.parameters()), merged_parameters(self.student), 1 - self.args.ema)

    def check_loss(self) -> None:
        """Raise UserError if a term has become NaN or infinite in this epoch: the sums remain so."""
        if not torch.isfinite(self.sums).all():
            if distributed.rank():
                sys.exit(2)  # as all ranks do; rank 0 reports it
            raise UserError(f"the loss is not finite at iteration {self.iteration}: "
                            f"{format_terms(*self.loss_of(self.sums))}; the last checkpoints are in "
                            f"{self.experiment.folder}; try a lower --lr, --grad_norm, or --precision single")

    @torch.no_grad()
    def check_weights(self) -> None:
        """Raise UserError, before anything is saved, if the outputs are not finite after the last update of the weights."""
        self.check_loss()
        nets = [net for net in (self.student, self.ema) if net is not None]
        outputs = [self.distiller.run(net, self.last_lr, features=False).sr for net in nets if self.last_lr is not None]
        if not all(x.isfinite().all() for x in [*outputs, *self.loss.parameters()]):
            raise UserError(f"after the update of iteration {self.iteration} the outputs are not finite (terms of the "
                            f"loss, summed over the epoch: {format_terms(*self.loss_of(self.sums))}); try a lower --lr, "
                            "or --grad_norm")

    def test_epoch(self) -> None:
        """Test the student, add the epoch to the history, and save everything."""
        if not distributed.rank():
            self.check_weights()
        self.student.eval()
        tested = self.ema or merged(self.student)
        upscale = evaluation.by_network(tested, self.device, self.args)
        folder = self.experiment.folder
        with evaluation.Writer(folder, self.args.save_gt) if self.args.save_results else nullcontext() as writer:
            scores = [evaluation.score(upscale, images, writer, stop=lambda: self.interruption.status,
                                       space=self.args.metric_space, perceptual=self.metrics)
                      for images in self.benchmarks]
        if None in scores:
            return
        epoch = len(self.history) + 1
        total, means = self.mean_loss()
        gradients = {name: norm / count for name, norm, count in zip(self.loss.names, *self.gradients.tolist()) if count}
        self.history.append(dict(
            epoch=epoch, iteration=self.iteration, seconds=self.seconds, lr=learning_rate(self.args, self.iteration - 1),
            total=total, loss=means,
            scores={s.dataset: (s.psnr, s.ssim) for s in scores if s.psnr is not None},
            images={s.dataset: s.per_image for s in scores if s.psnr is not None},
            **({"gradients": gradients} if gradients else {}),
            **({"perceptual": {s.dataset: s.perceptual for s in scores if s.psnr is not None}} if self.metrics else {})))
        self.sums.zero_()
        self.gradients.zero_()
        best = evaluation.best(self.history)
        best_epoch = evaluation.best_epoch(self.history)
        for row in self.history[:-1]:
            if row["epoch"] != best_epoch:
                row.pop("images", None)  # the scores of all images in all epochs would make the state large
        if distributed.rank():
            return
        if self.board:
            self.add_test_to_board(self.history[-1], upscale)
        log.info("epoch %d\n%s", epoch, evaluation.table(scores, best))
        compared = published.comparison(self.args.published, {s.dataset: s.psnr for s in scores}, self.args)
        if compared and self.finished():
            log.info(compared)
        self.experiment.save_models(tested, epoch == best_epoch, epoch)
        if self.ema:
            self.experiment.save_model(self.student, "model_raw.pt")
        self.experiment.write_history(self.history)
        self.save_state()

    def save_state(self) -> None:
        """Save the training state, from which a resumed run continues with bit-identical results."""
        if not distributed.rank():
            self.check_weights()
            self.experiment.save_state(resume.state_of(self))


def format_terms(total: float, values: dict[str, float]) -> str:
    """Format the loss and each of its terms."""
    return f"loss {total:.4f}" + "".join(f" {name} {value:.4f}" for name, value in values.items())


def bar(description: str, first: int, start: int, stop: int) -> tqdm:
    """Return a progress bar over iterations first..stop that begins at `start`; it redraws rarely without a terminal."""
    return tqdm(desc=description, total=stop - first, initial=start - first, unit="it", dynamic_ncols=True, leave=False,
                mininterval=redraw_interval(0.5), smoothing=0.05)
