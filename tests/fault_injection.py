"""Fault injection: runs that are killed, lose their disk or their output, or start together, against undisturbed twins.

Run by scripts/fault_test.sh, not by pytest. Each run is a real process of train.py or test.py on tiny images, in a folder of
its own. A killed run is resumed (started again where nothing was saved), perhaps killed again, and at last left to finish;
what it leaves must equal, bit by bit, what an uninterrupted run of the same command, its twin, left. The table counts:

trials, kills    runs, and the signals that reached them
lost             a run that cannot go on or does not finish; iterations that are gone although they were saved, or logged
                 before a signal after which a run saves
different        models, state, scores, losses, images or cached arrays that are not those of the twin, also between kills
tracebacks       processes that printed one
status           other exit statuses than the documented ones, and processes that outlived their run
leftovers        temporary files that are still there after the last, undisturbed part of the run
"""
import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

CODE = Path(__file__).resolve().parent.parent / "code"
sys.path.insert(0, str(CODE))

from checkpoint import save_model  # noqa: E402
from model.rcan import RCAN  # noqa: E402

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP
LIMIT = 180  # seconds that a run may take, undisturbed or after a signal, before it counts as hanging
COLUMNS = "trials", "kills", "lost", "different", "tracebacks", "status", "leftovers"
FAILURES = "lost", "different", "tracebacks", "status"
LOGGED = re.compile(r" \[([0-9]+)/[0-9]+\] ")  # an iteration in log.txt
SMALL = "--cpu --scale 2 --n_threads 0"
TRAIN = (f"{SMALL} --patch_size 24 --batch_size 4 --data_train tiny --data_test tiny --epochs 2 --print_every 1 "
         "--save_every 0.1 --lr 1e-3")
LARGE = "--data_train large --data_test large --epochs 1"
RUN = f"{TRAIN} --model RCAN --n_resgroups 1 --n_resblocks 1 --n_feats 8 --reduction 4"


@dataclass(frozen=True)
class Configuration:
    """A command whose runs are disturbed; `caches` gives each of its runs an empty cache of its own."""
    name: str
    flags: str
    script: str = "train.py"
    caches: bool = False


KILLED = (
    Configuration("feature terms", f"{RUN} --teacher TEACHER --loss 1*DS+1*TS+1*SA+1*fitnet --ema 0.9 --test_every 40"),
    Configuration("upcycled views", f"{RUN} --teacher TEACHER --loss 1*DS+1*TS --upcycle 1*zoom_in+1*zoom_out "
                  "--label_consistency 0.3 --test_every 40"),
    Configuration("GAN", f"{RUN} --loss 1*DS+0.1*GAN --batch_size 2 --test_every 10"),
    Configuration("cached teacher outputs", f"{RUN} --data_train large --teacher TEACHER --loss 1*TS "
                  "--cache_teacher --n_threads 1 --test_every 80", caches=True),
    Configuration("channel slice", f"{TRAIN} --teacher TEACHER --width_mult 0.5 --loss 1*DS+1*T_DS+1*CSD "
                  "--neg_num 2 --feature_net random --test_every 8"),
    Configuration("two processes", f"{RUN} --n_GPUs 2 --teacher TEACHER --loss 1*DS+1*TS+1*IA --test_every 40"),
    Configuration("workers", f"{RUN} --n_threads 2 --optimizer SGD --loss 1*DS --test_every 100"),
    Configuration("decoding", f"{RUN} {LARGE} --loss 1*DS --test_every 3", caches=True),
    Configuration("testing", f"{SMALL} --ckp_path TEACHER --data_test large --save_results --save_gt", "test.py"),
)
ONCE = Configuration("", f"{RUN} --teacher TEACHER --loss 1*DS+1*TS --save_results --test_every 20", caches=True)
TOGETHER = (Configuration("", f"{RUN} {LARGE} --loss 1*DS --test_every 5", caches=True),
            Configuration("", f"{RUN} {LARGE} --teacher TEACHER --loss 1*TS --cache_teacher --test_every 5", caches=True))


@dataclass
class Twin:
    """What an uninterrupted run left, and how long it took, in seconds: until it wrote its first file, and in all."""
    folder: Path
    iterations: int
    until_first_file: float
    seconds: float


@dataclass
class Trial:
    """What is counted of one disturbed run; `events` say what was done to it, in order."""
    name: str
    counts: Counter = field(default_factory=Counter)
    events: list = field(default_factory=list)

    def fault(self, column, text):
        self.counts[column] += 1
        self.events.append(f"{column.upper()}: {text}")


class Run:
    """A process of train.py or test.py and its children, known by a variable in their environment."""

    def __init__(self, bench, configuration, folder, resume=False, cache=None, wrapper=(), stdout=None):
        self.tag = uuid.uuid4().hex
        self.folder, self.output = folder, bench.root / "output" / self.tag
        cache = cache or (folder / "cache" if configuration.caches else bench.root / "cache")
        flags = configuration.flags.replace("TEACHER", str(bench.root / "teacher.pt")).split()
        command = [sys.executable, str(CODE / configuration.script), *flags, "--dir_data", str(bench.root / "data"),
                   "--dir_cache", str(cache), "--ckp_dir", str(folder / "run"), *(["--resume", "1"] if resume else [])]
        if bench.stopping:
            raise RuntimeError("the fault test was stopped")
        self.began = time.monotonic()
        log = folder / "run" / "log.txt"
        self.log_size = log.stat().st_size if log.exists() else 0
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [*wrapper, *command], cwd=CODE, stdin=subprocess.DEVNULL, stdout=file if stdout is None else stdout,
                stderr=file, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT_TEST": self.tag})
        bench.running.append(self)

    def pids(self):
        """Return the numbers of all its processes that have not ended."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if f"FAULT_TEST={self.tag}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self):
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def wrote(self):
        """Return whether a file in its folder has changed since it began."""
        begun = time.time() - (time.monotonic() - self.began)
        for folder, _, files in os.walk(self.folder):
            for name in files:
                with contextlib.suppress(OSError):
                    if os.stat(os.path.join(folder, name)).st_mtime > begun and name != ".lock":
                        return True
        return False

    def wait_until(self, condition, seconds):
        """Return False where the process ended, or the time was over, before the condition became true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return False

    def finish(self, trial, allowed):
        """Wait for all its processes; count hangs, tracebacks and other exit statuses than the allowed ones."""
        try:
            status = self.process.wait(LIMIT)
            end = time.monotonic() + LIMIT / 2
            while self.pids() and time.monotonic() < end:
                time.sleep(0.02)
            if self.pids():
                trial.fault("status", f"processes outlived the run by {LIMIT / 2:g} s")
        except subprocess.TimeoutExpired:
            status = None
            trial.fault("lost", f"the run hung for {LIMIT} s")
        self.kill()
        self.process.wait()
        text = self.text()
        if "Traceback" in text:
            trial.fault("tracebacks", " | ".join(text[text.index("Traceback"):].splitlines()[-4:]))
        if status is not None and status not in allowed:
            trial.fault("status", f"exit status {status}, not {' or '.join(map(str, allowed))}: {self.last_line()}")
        return status

    def text(self):
        return self.output.read_text(errors="replace").replace("\r", "\n")

    def last_line(self):
        return next((line for line in reversed(self.text().splitlines()) if line.strip()), "no output")

    def logged(self):
        """Return the last iteration that this process wrote to log.txt, else 0."""
        try:
            text = (self.folder / "run" / "log.txt").read_bytes()[self.log_size:].decode(errors="replace")
        except OSError:
            return 0
        return int((LOGGED.findall(text) or [0])[-1])


# ---- what a run has left

def load(path):
    """Return the content of a file of torch.save; raises for a damaged one."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("wrong checksum")
    return torch.load(path, "cpu", weights_only=True)


def same(a, b):
    """Return whether two contents of saved files are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape \
            and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def files_of(folder, pattern):
    return {str(file.relative_to(folder)): file for file in folder.rglob(pattern)
            if file.is_file() and not file.name.startswith(".")}


def saved_iteration(folder):
    """Return the iteration of state.pt, -1 where there is none; raises for a damaged file."""
    path = folder / "run" / "state.pt"
    return load(path)["iteration"] if path.exists() else -1


def check_between(trial, folder, twin, configuration, cache):
    """Compare what must be right at any moment: whole files, the rows written so far, images and cached arrays."""
    for name, file in files_of(folder / "run", "*.pt").items():
        try:
            load(file)
        except Exception as error:
            trial.fault("different", f"{name}: damaged ({error})")
    for name in ("metrics.csv", "loss.csv"):
        file = folder / "run" / name
        if file.exists() and not (twin.folder / "run" / name).read_text().startswith(file.read_text()):
            trial.fault("different", f"{name}: not the first rows of the twin's")
    check_bytes(trial, cache, twin.folder / "cache" if configuration.caches else cache, "*.npy")
    if configuration.script == "test.py":
        check_bytes(trial, folder / "run", twin.folder / "run", "*.png")


def check_bytes(trial, folder, reference, pattern, complete=False):
    """Compare the files of two folders byte by byte; `complete`: there must be as many."""
    found, wanted = files_of(folder, pattern), files_of(reference, pattern)
    wrong = [name for name in found if name not in wanted or found[name].read_bytes() != wanted[name].read_bytes()]
    wrong += [name for name in wanted if complete and name not in found]
    if wrong:
        trial.fault("different", f"{len(wrong)} of {len(wanted)} files, the first {wrong[0]}")


def check_finished(trial, folder, twin, configuration, cache):
    """Compare all that a finished run has left with its twin's, and count temporary files."""
    for name in files_of(twin.folder / "run", "*.pt"):
        path = folder / "run" / name
        if not path.exists():
            trial.fault("lost", f"{name} is not there")
        elif not same(load(path), load(twin.folder / "run" / name)):
            trial.fault("different", f"{name}")
    for pattern in ("*.csv", "*.png"):  # the curves are functions of the rows
        check_bytes(trial, folder / "run", twin.folder / "run", pattern, complete=True)
    if configuration.caches:
        check_bytes(trial, cache, twin.folder / "cache", "*.npy", complete=True)
    trial.counts["leftovers"] += len([file for file in folder.rglob("*.part*") if file.is_file()])


# ---- the disturbances

class Bench:
    """A temporary folder with data, a teacher, and the twins, which are made when they are first needed."""

    def __init__(self, root, seed):
        self.root, self.seed = root, seed
        self.running, self.stopping, self.can_mount = [], False, None
        self.twins, self.locks, self.lock = {}, {}, threading.Lock()
        (root / "output").mkdir()
        generator = np.random.default_rng(0)
        for name, count, height, width in (("tiny", 4, 56, 64), ("large", 24, 240, 320)):
            folder = root / "data" / name / "HR"
            folder.mkdir(parents=True)
            for index in range(count):
                coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, height // 8, width // 8)))
                image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
                iio.imwrite(folder / f"{index}.png", image[0].permute(1, 2, 0).byte().numpy())
        torch.manual_seed(7)
        save_model(RCAN(2, n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4), root / "teacher.pt")

    def twin(self, configuration):
        with self.lock:
            lock = self.locks.setdefault(configuration, threading.Lock())
        with lock:
            if configuration not in self.twins:
                self.twins[configuration] = self.make_twin(configuration)
            return self.twins[configuration]

    def make_twin(self, configuration):
        folder = self.root / f"twin-{uuid.uuid4().hex}"
        folder.mkdir()
        run = Run(self, configuration, folder)
        run.wait_until(run.wrote, LIMIT)
        until_first_file = time.monotonic() - run.began
        if run.process.wait(LIMIT):
            raise RuntimeError(f"an uninterrupted run failed: {configuration}\n{run.text()[-2000:]}")
        return Twin(folder, saved_iteration(folder), until_first_file, time.monotonic() - run.began)

    def kill_trial(self, configuration, kills, number):
        """Kill a run up to `kills` times, resume it, let it finish, compare."""
        rng = random.Random(f"{self.seed} {configuration.name} {number}")
        trial, twin = Trial(configuration.name), self.twin(configuration)
        folder = self.root / f"trial-{uuid.uuid4().hex}"
        folder.mkdir()
        cache = folder / "cache" if configuration.caches else self.root / "cache"
        saved, status = -1, None
        while True:
            run = Run(self, configuration, folder, resume=saved >= 0)
            struck = kills > trial.counts["kills"] and self.strike(run, rng, twin, saved, trial)
            if not struck:
                status = run.finish(trial, (0,))
                break
            sent, whole = struck
            if sent == signal.SIGKILL:
                run.finish(trial, (-sent, 0) if whole else (-sent, 2, 0))
            else:
                run.finish(trial, (128 + sent, -sent, 0))
            try:
                before, saved = saved, saved_iteration(folder)
            except Exception as error:
                trial.fault("lost", f"state.pt is damaged: {error}")
                break
            trial.events.append(f"saved at iteration {saved}, logged {run.logged()}")
            if saved < before:
                trial.fault("lost", f"state.pt went back from iteration {before} to {saved}")
            if sent != signal.SIGKILL and max(saved, 0) < run.logged():
                trial.fault("lost", f"iteration {run.logged()} was logged, {saved} saved on {sent.name}")
            check_between(trial, folder, twin, configuration, cache)
            if before == saved == twin.iterations > 0:
                kills = 0  # nothing is left to train: more kills would only seem to be survived
        if status == 0:
            check_finished(trial, folder, twin, configuration, cache)
        elif status is not None:
            trial.fault("lost", f"the run could not go on: {run.last_line()}")
        shutil.rmtree(folder)
        return trial

    def strike(self, run, rng, twin, saved, trial):
        """Send a random signal at a random moment -> (signal, whether to all processes); None where the run ended before.

        Most moments lie after the first file was written, some anywhere. `saved`: the iteration that the run goes on from.
        """
        if rng.random() < 0.2:
            delay = rng.uniform(0, twin.seconds)
        else:
            run.wait_until(run.wrote, LIMIT)
            left = max(0.2, 1 - max(saved, 0) / max(twin.iterations, 1))
            delay = rng.uniform(0, left * (twin.seconds - twin.until_first_file))
        run.wait_until(lambda: False, delay)
        if run.process.poll() is not None:
            return None
        sent, whole, pids = rng.choice(SIGNALS), rng.random() < 0.5, run.pids()
        try:
            if sent == signal.SIGKILL:  # a machine that goes down, or one process for lack of memory
                for pid in pids if whole else [rng.choice(pids or [run.process.pid])]:
                    os.kill(pid, sent)
            elif whole:  # as a terminal does
                os.killpg(run.process.pid, sent)
            else:
                os.kill(run.process.pid, sent)
        except ProcessLookupError:
            return None
        trial.counts["kills"] += 1
        trial.events.append(f"{sent.name} to {'all' if whole else 'one'} of {len(pids)} processes after "
                            f"{time.monotonic() - run.began:.2f} s")
        return sent, whole

    def disk_trial(self, number):
        """Run on a disk that is too small, then go on with room made there, and compare."""
        rng = random.Random(f"{self.seed} disk {number}")
        trial, twin = Trial("full disk"), self.twin(ONCE)
        sizes = [file.stat().st_size for file in twin.folder.rglob("*") if file.is_file()]
        folder = self.root / f"disk-{uuid.uuid4().hex}"
        folder.mkdir()
        wrapper = ()
        with contextlib.ExitStack() as stack:
            if self.mounts():
                room = int(rng.uniform(0.02, 1) * sum(sizes))
                self.mount(folder, room)
                stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
            else:
                room = int(rng.uniform(0.02, 1) * max(sizes))
                wrapper = "sh", "-c", 'ulimit -f "$0"; exec "$@"', str(max(1, room // 512))
            trial.events.append(f"room for {room:,} bytes of {sum(sizes):,}")
            run = Run(self, ONCE, folder, wrapper=wrapper)
            status = run.finish(trial, (0, 2))
            trial.events.append(run.last_line())
            if status == 2 and not run.last_line().startswith("error: "):
                trial.fault("status", f"status 2 without a line that says why: {run.last_line()}")
            if self.mounts():
                subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            run = Run(self, ONCE, folder, (folder / "run" / "state.pt").exists())
            if run.finish(trial, (0,)) == 0:
                check_finished(trial, folder, twin, ONCE, folder / "cache")
            else:
                trial.fault("lost", f"with room again the run could not go on: {run.last_line()}")
        shutil.rmtree(folder)
        return trial

    def mounts(self):
        """Return whether this user may mount a tmpfs; else files are limited in size instead of the disk."""
        with self.lock:
            if self.can_mount is None:
                folder = self.root / "mount"
                folder.mkdir()
                self.can_mount = self.mount(folder, 1 << 20)
                if self.can_mount:
                    subprocess.run(["umount", str(folder)], check=True)
                else:
                    print("no right to mount a small disk: files are limited in size instead (ulimit -f)", file=sys.stderr)
            return self.can_mount

    def mount(self, folder, size):
        return not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False,
                                  capture_output=True).returncode

    def start_trial(self, number):
        """Start three runs at once on data that nobody has decoded yet: all must finish as if they were alone."""
        configuration = TOGETHER[number % len(TOGETHER)]
        trial, twin = Trial("concurrent starts, one cache"), self.twin(configuration)
        folder = self.root / f"starts-{uuid.uuid4().hex}"
        for name in "abc":
            (folder / name).mkdir(parents=True)
        runs = [Run(self, configuration, folder / name, cache=folder / "cache") for name in "abc"]
        for run in runs:
            if run.finish(trial, (0,)) == 0:
                check_finished(trial, run.folder, twin, configuration, folder / "cache")
            else:
                trial.fault("lost", f"a run failed: {run.last_line()}")
        trial.counts["leftovers"] += len(list((folder / "cache").rglob("*.part*")))
        shutil.rmtree(folder)
        return trial

    def folder_trial(self, number):
        """Start two runs at once in one folder: one must finish as if it were alone, the other say why it does not run."""
        trial, twin = Trial("concurrent starts, one folder"), self.twin(ONCE)
        folder = self.root / f"folder-{uuid.uuid4().hex}"
        folder.mkdir()
        runs = [Run(self, ONCE, folder) for _ in range(2)]
        if number % 2:
            time.sleep(twin.until_first_file)  # the second finds its images decoded: it is at the lock in another moment
        statuses = [run.finish(trial, (0, 2)) for run in runs]
        if sorted(map(str, statuses)) != ["0", "2"]:
            trial.fault("lost", f"exit statuses {statuses}, not 0 and 2: {runs[0].last_line()}; {runs[1].last_line()}")
        check_finished(trial, folder, twin, ONCE, folder / "cache")
        shutil.rmtree(folder)
        return trial

    def output_trial(self, number):
        """Take standard output away from a run: it must finish all the same."""
        rng = random.Random(f"{self.seed} output {number}")
        trial, twin = Trial("output lost"), self.twin(ONCE)
        folder = self.root / f"output-{uuid.uuid4().hex}"
        folder.mkdir()
        kind = ("| head", ">/dev/full", ">&-")[number % 3]
        trial.events.append(kind)
        if kind == "| head":
            read, write = os.pipe()
            run = Run(self, ONCE, folder, stdout=write)
            os.close(write)
            os.set_blocking(read, False)
            run.wait_until(lambda: False, rng.uniform(0, twin.seconds))
            os.close(read)
        elif kind == ">/dev/full":
            with open("/dev/full", "wb") as full:
                run = Run(self, ONCE, folder, stdout=full)
        else:
            run = Run(self, ONCE, folder, wrapper=("sh", "-c", 'exec "$0" "$@" >&-'))
        if run.finish(trial, (0,)) == 0:
            check_finished(trial, folder, twin, ONCE, folder / "cache")
        else:
            trial.fault("lost", f"the run did not finish: {run.last_line()}")
        shutil.rmtree(folder)
        return trial


# ---- the whole

class Campaign:
    """Deals out trials to threads until the kills are done, and adds up their counts."""

    def __init__(self, bench, kills, only):
        self.bench, self.kills, self.lock = bench, kills, threading.Lock()
        self.configurations = [one for one in KILLED if only in one.name]
        others = {"full disk": bench.disk_trial, "concurrent starts, one cache": bench.start_trial,
                  "concurrent starts, one folder": bench.folder_trial, "output lost": bench.output_trial}
        times = max(2, kills // 40)
        self.others = [(function, number) for number in range(times) for name, function in others.items() if only in name]
        self.table = {name: Counter() for name in [*(one.name for one in self.configurations),
                                                   *(name for name in others if only in name)]}
        self.reserved, self.numbers = Counter(), Counter()
        self.failed = []
        self.began = time.monotonic()

    def next(self):
        """Return a function that makes one trial, of the configuration with the fewest kills; None when there are enough."""
        with self.lock:
            missing = self.kills - self.count("kills") - self.reserved.total()
            if self.configurations and missing > 0:
                one = min(self.configurations, key=lambda one: self.table[one.name]["kills"] + self.reserved[one.name])
                number = self.numbers[one.name]
                self.numbers[one.name] += 1
                kills = min(missing, random.Random(f"{self.bench.seed} {one.name} {number} kills").randint(2, 5))
                self.reserved[one.name] += kills
                return lambda: (self.bench.kill_trial(one, kills, number), kills)
            if self.others:
                function, number = self.others.pop(0)
                return lambda: (function(number), 0)
            return None

    def count(self, column):
        return sum(row[column] for row in self.table.values())

    def work(self):
        try:
            while not self.bench.stopping:
                trial = self.next()
                if trial:
                    self.add(*trial())
                elif not self.reserved.total():
                    return
                else:
                    time.sleep(0.5)  # a trial that is under way may end with fewer kills than were kept for it
        finally:
            self.bench.stopping |= sys.exc_info()[0] is not None

    def add(self, trial, kept):
        with self.lock:
            self.reserved[trial.name] -= kept
            self.table[trial.name].update(trials=1, **trial.counts)
            minutes = (time.monotonic() - self.began) / 60
            if any(trial.counts[column] for column in FAILURES):
                self.failed.append(trial)
                print(f"\n{trial.name}:", *trial.events, sep="\n  ", flush=True)
            print(f"{self.count('kills')}/{self.kills} kills, {self.count('trials')} trials, {minutes:.1f} min",
                  file=sys.stderr, flush=True)

    def report(self):
        """Return the table as lines of Markdown."""
        lines = ["| configuration | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
        total = sum(self.table.values(), Counter())
        for name, row in [*self.table.items(), ("all", total)]:
            lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in COLUMNS) + " |")
        return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Disturb runs at random and compare what they leave with undisturbed ones.")
    parser.add_argument("--kills", type=int, default=200, help="signals in all (default: 200, half an hour on two cores)")
    parser.add_argument("--seed", type=int, default=0, help="of signals, their targets and moments (default: 0)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)),
                        help="trials at the same time (default: one for each core)")
    parser.add_argument("--only", default="", help="configurations whose name contains this word")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = Path(tempfile.mkdtemp(prefix="fault_test."))
    bench = Bench(root, args.seed)
    campaign = Campaign(bench, args.kills, args.only)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for worker in [pool.submit(campaign.work) for _ in range(args.jobs)]:
            worker.result()
    finally:
        bench.stopping = True
        for run in bench.running:
            if run.process.poll() is None:
                run.kill()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(root, ignore_errors=True)
    minutes = (time.monotonic() - campaign.began) / 60
    print(f"\n{campaign.report()}\n\n{campaign.count('kills')} kills in {minutes:.1f} minutes, "
          f"{args.jobs} trials at a time, seed {args.seed}")
    return 1 if campaign.failed else 0


if __name__ == "__main__":
    sys.exit(main())
