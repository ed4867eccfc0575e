"""The distillation loop. Which method it runs is the loss's business: nothing here knows."""
import copy
import logging
import math
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial

import evaluation
import torch
from checkpoint import check_history
from data import make_batches
from data.teacher_cache import decode
from data.views import make_views, together
from loss import Output, Step, join
from loss.consistency import on_perturbed
from model import describe
from option import Iterations
from system import distributed
from system.device import autocast
from system.errors import UserError
from system.memory_budget import memory_kept
from system.state import check_like, load_optimizer
from tqdm import tqdm

log = logging.getLogger("sr")


class Trainer:
    def __init__(self, args, student, teachers, loss, crops, benchmarks, experiment, device):
        self.args, self.loss, self.experiment, self.device = args, loss, experiment, device
        self.crops, self.benchmarks = crops, benchmarks
        loss.to(device, memory_format=torch.channels_last)
        self.student = student.to(device, memory_format=torch.channels_last)
        self.teachers = [net.to(device, memory_format=torch.channels_last) for net in teachers]
        own = set(student.parameters())  # a student that is a slice of its teacher trains the weights of both
        for net in self.teachers:
            net.eval()
            for parameter in set(net.parameters()) - own:
                parameter.requires_grad_(False)
        self.trained = [parameter for parameter in (*student.parameters(), *loss.trained()) if parameter.requires_grad]
        self.optimizer = make_optimizer(args, self.trained)
        self.evaluate = distributed.Computation(self.judge, self.trained)
        self.compiled = {}
        self.average = copy.deepcopy(student).eval().requires_grad_(False) if args.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "half")
        self.iteration, self.iterations = 0, args.epochs * args.test_every
        self.history = []  # a dict an epoch: what the CSV files and curves show
        self.sums = torch.zeros(len(loss.names), dtype=torch.float64, device=device)  # of the terms, in this epoch
        self.probe = None  # the LR images of the last batch: what says whether the weights are still good
        if experiment.state is not None:
            self.load_state(experiment.state)
            experiment.state = None  # the weights need not be kept twice

    def fit(self):
        """Trains until --epochs are done and tested; returns the process's exit status."""
        args = self.args
        if self.finished():
            log.info("the run is finished: --epochs %d are done", args.epochs)
        self.evaluate = distributed.wrap(self.evaluate)
        if args.compile:
            self.compile()
        with Interruption() as self.interruption, memory_kept(self.device):
            batches = iter(make_batches(args, self.crops, self.iteration, self.iterations, self.device.type == "cuda"))
            while not self.finished() and not self.interrupted():
                if self.train_epoch(batches):
                    self.test_epoch()
            status = self.interrupted()
            if status:
                self.save_state()
                log.info("stopped at iteration %d; %s", self.iteration, "the run is finished" if self.finished() else
                         "the same command with --resume 1 goes on from there")
            del batches  # ends its workers while Ctrl-C is handled
        return status

    def finished(self):
        return len(self.history) >= self.args.epochs

    def interrupted(self):
        """The exit status that a signal asks for, the same in all processes, whichever of them it reached; else 0."""
        return distributed.all_reduce_max(self.interruption.status or (128 + signal.SIGTERM) * distributed.launcher_died())

    def train_epoch(self, batches):
        """Trains to the end of the epoch, of which a part may be done; False where that was interrupted."""
        args, start, end = self.args, self.iteration, (len(self.history) + 1) * self.args.test_every
        self.student.train()
        began = saved = time.monotonic()
        waited, printed = 0.0, start
        with bar(f"epoch {len(self.history) + 1}/{args.epochs}", end - args.test_every, start, end) as progress:
            while self.iteration < end:
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                values = self.step(*batch)
                self.sums += values
                self.iteration += 1
                if self.iteration % args.print_every == 0 or self.iteration == end:
                    self.check()
                    now = time.monotonic()
                    log.info("[%d/%d] %s  %.2f it/s, waiting for data %.1f %%", self.iteration, self.iterations,
                             self.describe(self.sums / self.summed),
                             (self.iteration - printed) / (now - began), 100 * waited / (now - began))
                    progress.set_postfix_str(self.describe(values), refresh=False)
                    began, waited, printed = now, 0.0, self.iteration
                elif self.device.type == "cpu":  # on a GPU to look at every value would stop it at every iteration
                    self.check()
                progress.update()
                if self.interrupted():
                    return False
                if time.monotonic() - saved >= args.save_every:
                    self.save_state()
                    saved = time.monotonic()
        self.save_state()
        return True

    @property
    def summed(self):
        """The number of iterations in `sums`; not always those since a multiple of --test_every, which may change."""
        return self.iteration - (self.history[-1]["iteration"] if self.history else 0)

    def step(self, lr, hr, answers=None):
        """One update of the student from a batch as `make_batches` gives it -> the weighted values of the loss's terms."""
        parts = self.args.split_batch
        self.steps, values = [], 0
        self.optimizer.zero_grad(set_to_none=True)
        for index, part in enumerate(zip(*(x.chunk(parts) for x in (lr, hr, answers) if x is not None))):
            last = index + 1 == parts
            with nullcontext() if last else self.evaluate.no_sync():
                total, of_part = self.evaluate(*part)
                self.scaler.scale(total / parts).backward()
            values = values + of_part / parts
        step = self.steps[0] if parts == 1 else join(self.steps)
        self.probe = step.lr
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args, self.iteration)
        if self.args.gclip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.args.gclip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.update_average()
        self.loss.update(step)
        self.steps = []
        return distributed.all_reduce_mean(values)

    def judge(self, lr, hr, answers=None):
        """The loss of a batch or a part of one -> (total, the weighted values of its terms); what it saw is in `steps`."""
        steps = self.look(lr, hr, answers)
        self.steps.append(steps[0])
        return self.loss(*steps)

    def look(self, lr, hr, answers):
        """A Step for each view of the batch, the plain one first: what student and teacher make of it.

        The student sees its inputs perturbed, as --label_consistency says, and its outputs are mapped back. answers: those
        of the teachers, where they were asked once and no term needs more of the plain view (data/teacher_cache.py).
        """
        views = make_views(lr.to(self.device, non_blocking=True), hr.to(self.device, non_blocking=True), self.args)
        for view in views:
            view.lr, view.hr = self.to_input(view.lr), None if view.hr is None else self.to_input(view.hr)
        needs = [self.loss.needs_on(view.name, view.hr is not None) for view in views]
        inputs, features = [view.lr for view in views], ["features" in need for need in needs]
        students = on_perturbed(partial(together, partial(self.run, self.student), features=features), inputs,
                                self.args.label_consistency, self.args.rgb_range)
        drawn = self.draw_teacher()
        net = None if drawn is None else self.teachers[drawn]
        known = None if answers is None else Output(self.to_input(decode(self.part_of(answers, drawn))))
        teachers = self.ask(net, inputs, features, needs, known)
        return [Step(view.lr, view.hr, student, teacher and teacher.detach(),
                     teacher.sr if "teacher_graph" in need else None, view.name, view.weight,
                     iteration=self.iteration, student_net=self.student, teacher_net=net,
                     average=self.average or self.student, run=lambda net, x: self.run(net, x, features=False).sr)
                for view, need, student, teacher in zip(views, needs, students, teachers)]

    def ask(self, net, inputs, features, needs, known):
        """The teacher's Output on each view, None where no term looks at it; with a graph where one trains the teacher.

        known: that on the plain view where it was asked before, else None.
        """
        outputs = {0: known} if known else {}
        for graph in (False, True):
            asked = [index for index, need in enumerate(needs)
                     if "teacher" in need and index not in outputs and graph == ("teacher_graph" in need)]
            with nullcontext() if graph else torch.inference_mode():
                found = together(partial(self.run, net), [inputs[index] for index in asked],
                                 [features[index] for index in asked])
            outputs.update(zip(asked, found if graph else (output.copy() for output in found)))
        return [outputs.get(index) for index in range(len(inputs))]

    def part_of(self, answers, drawn):
        """Those of one of several teachers, on the device."""
        return answers[:, 3 * drawn:3 * drawn + 3].to(self.device, non_blocking=True)

    @torch.no_grad()
    def update_average(self):
        """Moves the average of --ema towards the student."""
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - self.args.ema)

    def run(self, net, lr, features):
        with autocast(self.device, self.args):
            out = self.compiled.get(net, net)(lr, features=features)
        return Output(*out) if features else Output(out)

    def compile(self):
        """Compiles the networks (--compile), those which it can: a trial says so."""
        side, needs = self.args.patch_size // self.args.scale, self.loss.needs_on("plain", True)
        images = self.args.batch_size // (distributed.world_size() * self.args.split_batch)
        lr = self.to_input(torch.zeros(images, 3, side, side, device=self.device))
        for net in (self.student, *self.teachers):
            trained = net is self.student or "teacher_graph" in needs
            self.compiled[net] = torch.compile(net)
            try:
                with nullcontext() if trained else torch.inference_mode():
                    output = self.run(net, lr, "features" in needs)
                if trained:
                    torch.autograd.backward([x.sum() for x in (output.sr, *output.features)])
            except Exception as error:  # of the compiler, of what it calls, of the system's: there is no end of them
                del self.compiled[net]
                reason = " ".join(str(error).split())[:100]
                log.info("--compile: %s cannot be compiled here, it runs as it is (%s ...)", type(net).__name__, reason)
            self.optimizer.zero_grad(set_to_none=True)

    def draw_teacher(self):
        """The number of this batch's teacher; None where no term needs one."""
        if len(self.teachers) > 1:
            return int(torch.randint(len(self.teachers), ()))
        return 0 if self.teachers else None

    def to_input(self, x):
        x = x.to(memory_format=torch.channels_last).float()
        return x * (self.args.rgb_range / 255) if self.args.rgb_range != 255 else x

    def check(self):
        """Ends the run where a term has become NaN or infinite: sums stay so, whenever in the epoch it was."""
        if not torch.isfinite(self.sums).all():
            if distributed.rank():
                sys.exit(2)  # as all do, of which the main one says why
            raise UserError(f"the loss is not finite at iteration {self.iteration}: {self.describe(self.sums)}; what was "
                            f"saved before is in {self.experiment.folder}; try a lower --lr, --gclip, or --precision single")

    @torch.no_grad()
    def check_weights(self):
        """Ends the run, before anything is saved, where the last update made weights with which nothing can be computed."""
        self.check()
        nets = [net for net in (self.student, self.average) if net is not None]
        outputs = [self.run(net, self.probe, features=False).sr for net in nets] if self.probe is not None else []
        if not all(x.isfinite().all() for x in [*outputs, *self.loss.parameters()]):
            raise UserError(f"the update of iteration {self.iteration} made weights that give no finite image (its "
                            f"terms, with the epoch's before: {self.describe(self.sums)}); try a lower --lr, or --gclip")

    def describe(self, values):
        values = values.tolist()
        return f"loss {sum(values):.4f}" + "".join(f" {name} {value:.4f}" for name, value in zip(self.loss.names, values))

    def test_epoch(self):
        """Scores the student, keeps the epoch's record, and saves it all."""
        if not distributed.rank():
            self.check_weights()
        self.student.eval()
        tested = self.average or self.student
        upscale = evaluation.by_network(tested, self.device, self.args)
        folder = self.experiment.folder
        with evaluation.Writer(folder, self.args.save_gt) if self.args.save_results else nullcontext() as writer:
            scores = [evaluation.score(upscale, images, writer, stop=lambda: self.interruption.status)
                      for images in self.benchmarks]
        if None in scores:
            return
        epoch = len(self.history) + 1
        self.history.append(dict(
            epoch=epoch, iteration=self.iteration, lr=learning_rate(self.args, self.iteration - 1),
            loss=dict(zip(self.loss.names, (self.sums / self.summed).tolist())),
            scores={s.dataset: (s.psnr, s.ssim) for s in scores if s.psnr is not None}))
        self.sums.zero_()
        if distributed.rank():
            return
        best = evaluation.best(self.history)
        log.info("epoch %d\n%s", epoch, evaluation.table(scores, best))
        # best by the first test set, as in EDSR; without ground truth the latest is the best there is
        first = next(iter(self.history[-1]["scores"]), None)
        self.experiment.save_models(tested, first is None or best.get(first, (0, 0))[1] == epoch, epoch)
        if self.average:
            self.experiment.save_model(self.student, "model_raw.pt")
        self.experiment.write_history(self.history)
        self.save_state()

    def identity(self):
        """What a resumed run must have in common with the one that it continues."""
        return {"network": describe(self.student), "loss": "+".join(self.loss.names), "optimizer": self.args.optimizer,
                "first test set": next((f"{images.name}, {len(images)} images" for images in self.benchmarks
                                        if any(pair.hr for pair in images.pairs)), None)}  # what model_best.pt is chosen by

    def save_state(self):
        if distributed.rank():
            return
        self.check_weights()
        self.experiment.save_state(self.state())

    def state(self):
        """What `load_state` goes on from."""
        return dict(
            identity=self.identity(), iteration=self.iteration, history=self.history, sums=self.sums,
            student=self.student.state_dict(), loss=self.loss.state_dict(), optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(), average=self.average.state_dict() if self.average else None,
            random=torch.get_rng_state(),
            random_cuda=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None)

    def load_state(self, state):
        """Continue from what `state` returned; raises UserError where it does not fit this run, before it is changed."""
        path, own = self.experiment.folder / "state.pt", self.state()
        try:
            before = {**own["identity"], **state["identity"]}  # earlier versions recorded less
            for name, value in own["identity"].items():
                if before[name] != value:
                    raise UserError(f"--resume 1: the run in {path.parent} was another one ({name}: {before[name]}, not "
                                    f"{value}); resume it with its own flags, see config.txt there")
            for name in ("iteration", "student", "loss", "sums", "random"):
                check_like(state[name], own[name], name)
            check_history(state["history"], self.loss.names, state["iteration"])
            self.student.load_state_dict(state["student"])
            self.loss.load_state_dict(state["loss"])
            if self.average:
                average = state["student"] if state["average"] is None else state["average"]
                check_like(average, own["average"], "average")
                self.average.load_state_dict(average)
            load_optimizer(self.optimizer, state["optimizer"])
            if state["scaler"] and self.scaler.is_enabled():
                check_like(state["scaler"], own["scaler"], "scaler")
                self.scaler.load_state_dict(state["scaler"])
            self.sums.copy_(state["sums"])
            self.iteration, self.history = state["iteration"], state["history"]
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["random_cuda"] is not None:
                torch.cuda.set_rng_state(state["random_cuda"], self.device)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not the state of such a run ({reason}); resume it with its own flags, see config.txt "
                            "there, or start it anew with --reset") from None
        done, every = len(self.history), self.args.test_every
        if self.iteration > self.iterations or not done * every <= self.iteration <= (done + 1) * every:
            raise UserError(f"--resume 1: the run is at iteration {self.iteration} after {done} epochs, which does not fit "
                            f"--test_every {every} and --epochs {self.args.epochs}")


def make_optimizer(args, parameters):
    shared = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == "ADAM":
        return torch.optim.Adam(parameters, betas=args.betas, eps=args.epsilon, fused=True, **shared)
    if args.optimizer == "SGD":
        return torch.optim.SGD(parameters, momentum=args.momentum, fused=True, **shared)
    return torch.optim.RMSprop(parameters, momentum=args.momentum, eps=args.epsilon, **shared)


def learning_rate(args, iteration):
    """The rate of one iteration, of 0 .. epochs x test_every - 1: a function of its number, so no resumed run is off.

    Over the first --warmup iterations it rises linearly, up to the whole of it at the last of them; cosine begins after.
    """
    if iteration < args.warmup:
        return rate_after_warmup(args, iteration) * (iteration + 1) / args.warmup
    return rate_after_warmup(args, iteration)


def rate_after_warmup(args, iteration):
    if args.decay == "cosine":
        part = max(iteration - args.warmup, 0) / (args.epochs * args.test_every - args.warmup)
        return args.lr * 0.5 * (1 + math.cos(math.pi * part))
    done = iteration if isinstance(args.decay, Iterations) else iteration // args.test_every
    return args.lr * args.gamma ** sum(done >= step for step in args.decay)


def bar(description, first, start, stop):
    """Progress over iterations first..stop of which those before start are done; rarely redrawn where nobody watches."""
    return tqdm(desc=description, total=stop - first, initial=start - first, unit="it", dynamic_ncols=True, leave=False,
                mininterval=0.5 if sys.stderr.isatty() else 30, smoothing=0.05)


class Interruption:
    """While in it, Ctrl-C, SIGTERM and SIGHUP only set `status` (130, 143, 129), for the loop to end in order.

    A second signal ends the process, but not one that follows at once: torchrun passes on to its processes what the terminal
    has sent to them already. A SIGHUP that is ignored (nohup) stays ignored.
    """
    PAUSE = 1  # second
    NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __enter__(self):
        self.status, self.noted = 0, 0.0
        self.before = {number: signal.signal(number, self.note) for number in self.NUMBERS
                       if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def note(self, number, frame):
        now = time.monotonic()
        if not self.status:
            self.status, self.noted = 128 + number, now
        elif now - self.noted > self.PAUSE:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
