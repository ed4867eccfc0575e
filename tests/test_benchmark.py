"""The benchmark: each comparison at a tiny size, its table and figure, errors on wrong results, and the counters."""
import csv
import subprocess
import tempfile
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import benchmark
import data
import inference
import option
import reference
from model.edsr import EDSR
from reference import formula, measure, plot, restoration, training
from summary import count
from system import flops, memory
from test_scripts import checkout  # noqa: F401 - a fixture

CPU = torch.device("cpu")
SIZES = {"affinity": 8, "affinity_batch": 8, "san_pooling": 12, "san_forward": 13, "whole_image": 20, "chop": 32,
         "dukd_step": 32, "teacher_cache": 32, "data": 32, "precision": 12, "nafnet_step": 48,
         "restormer_step": 32}
RANDOM = "dukd_step", "teacher_cache"
STEPS = {"nafnet_step": 1e-4, "restormer_step": 1e-4}  # with gradients, which are sums over all pixels
NETWORKS = training.STUDENT, training.TEACHER


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(option, "ROOT", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(formula, "chop", partial(inference.chop, tile=12))  # nine tiles, with an overlap of 6
    monkeypatch.setattr(flops, "MATRIX_SIZES", dict(cpu=32))
    flops.peak_flops.cache_clear()
    edsr = dict(n_resblocks=1, n_feats=4)
    for module, constants in (
            (formula, dict(CHANNELS=16, SAN_SIZES=dict(n_resgroups=1, n_resblocks=1, reduction=2), EDSR_SIZES=edsr, SHAVE=2,
                           MIN_SIZE=200)),
            (training, dict(BATCH_SIZE=dict(cpu=2), CROPS=5, STUDENT=edsr, TEACHER=dict(edsr, n_feats=8),
                            HR_SIZE=(50, 70), EDSR_SIZES=dict(n_resblocks=1, n_feats=16))),
            (restoration, dict(NAFNET=dict(n_feats=16, enc_blk_nums=(1,), dec_blk_nums=(1,)),
                               RESTORMER=dict(n_feats=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1)))):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    sizes = {name: (make, (SIZES[name],)) for name, (make, _) in reference.COMPARISONS.items()}
    monkeypatch.setattr(reference, "COMPARISONS", sizes)


def run(name, size=None, repeats=1, limit=1e9):
    return measure.measure(name, size or SIZES[name], reference.COMPARISONS[name][0], CPU, repeats, limit)


def table(folder):
    with (folder / "experiment" / "benchmark" / "benchmark.csv").open() as file:
        return {row["comparison"]: row for row in csv.DictReader(file)}


# ---- the table

def test_every_comparison_is_a_row_whose_implementations_agree(run_main, tmp_path):
    status, out, _ = run_main("benchmark", "--cpu --repeats 2")
    rows = table(tmp_path)
    assert status == 0 and list(rows) == list(SIZES) and [line.split()[0] for line in out[2:2 + len(SIZES)]] == list(SIZES)
    for name, row in rows.items():
        assert row["runs"] == "2" and row["size"] == str(SIZES[name])
        assert float(row["speedup"]) == pytest.approx(float(row["reference_s"]) / float(row["ours_s"]), rel=0.02)
        assert float(row["ours_MB"]) >= 0 and float(row["reference_MB"]) >= 0
        if name in RANDOM:
            assert row["difference"] == "-"
        else:
            assert float(row["difference"]) <= {"precision": 3e-2, "data": 0, **STEPS}.get(name, 1e-5)
        if name == "data":
            assert row["TFLOP/s"] == row["fraction_of_peak"] == "-"
        else:
            assert float(row["TFLOP/s"]) > 0 and float(row["fraction_of_peak"]) > 0
    assert float(rows["precision"]["difference"]) > 1e-4  # else it was not computed in bf16
    assert (tmp_path / "experiment" / "benchmark" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("tmp*"))  # no temporary folder is left


def test_a_reference_that_does_not_fit_is_not_run(run_main, tmp_path):
    status, out, _ = run_main("benchmark", "--cpu --repeats 1 --memory 1e-9 --only affinity+chop --sizes 16")
    rows = table(tmp_path)
    assert status == 0 and rows["affinity"]["reference_s"] == rows["chop"]["speedup"] == rows["chop"]["difference"] == "-"
    assert float(rows["affinity"]["reference_MB"]) > 0
    assert any("affinity 16: the reference was not run" in line for line in out)


def test_without_memory_for_the_exact_result_only_time_and_memory_are_compared():
    row, notes = run("chop", 64, limit=memory.memory_from_shapes(formula.chop_edsr(64, CPU).reference))
    assert row["difference"] == "-" and float(row["speedup"]) > 0 and not notes


def test_flops_per_second_and_their_fraction_of_the_peak(monkeypatch):
    for module in (flops, measure):
        monkeypatch.setattr(module, "run_time", lambda function, device: 2.0)
    a = torch.rand(16, 16)
    make = lambda size, device: reference.Comparison("", lambda: (a @ a,), lambda: (a @ a,), 0)  # noqa: E731
    row, _ = measure.measure("product", 16, make, CPU, 1, 1e9)
    assert float(row["TFLOP/s"]) == pytest.approx(16**3 / 1e12, rel=0.01)
    assert float(row["fraction_of_peak"]) == 0.12  # 16^3 / 32^3


def test_curves_have_hollow_markers_where_the_reference_was_not_run():
    cells = dict(comparison="chop", setting="", ours_s="1", ours_MB="3", reference_MB="9")
    axes = Figure().subplots(2)
    plot.draw_curves(axes, [dict(cells, size="4", reference_s="2"), dict(cells, size="8", reference_s="-")])
    for axis, known, hollow in zip(axes, ([2], [9, 9]), ([], [64])):
        reference_line, from_shapes, ours, _ = axis.lines
        assert list(reference_line.get_ydata()) == known and list(ours.get_xdata()) == [16, 64]
        assert list(from_shapes.get_xdata()) == hollow and from_shapes.get_markerfacecolor() == "white"


def test_comparisons_at_one_size_are_bars():
    axes = Figure().subplots(2)
    cells = dict(size="8", memory_ratio="2.00")
    plot.draw_ratios(axes, [dict(cells, comparison="a", speedup="3.00"), dict(cells, comparison="b", speedup="-")])
    assert [bar.get_width() for bar in axes[0].patches] == [2] and [bar.get_width() for bar in axes[1].patches] == [1, 1]


def test_many_comparisons_are_drawn_in_several_rows_of_panels():
    cells = dict(zip(benchmark.COLUMNS, ("", "", "8 maps", "1", *["2"] * 9)))
    rows = [{**cells, "comparison": name, "size": size} for name in "abcdef" for size in ("8", "12")]
    heights = [int.from_bytes(plot.picture(some)[20:24], "big") for some in (rows[::2], rows)]
    assert heights == [594, 2 * 594]


def test_the_files_go_to_the_output_folder_and_the_picture_follows_from_the_table(run_main, tmp_path):
    folder = tmp_path / "new" / "figure"
    assert run_main("benchmark", f"--cpu --repeats 1 --only affinity --sizes 8 --output {folder}")[0] == 0
    with (folder / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert plot.picture(rows) == (folder / "benchmark.png").read_bytes()
    assert not (tmp_path / "experiment").exists()


@pytest.mark.parametrize("value, digits, text", [
    (1220.39, 3, "1220"), (68736.8, 3, "68700"), (0.0054142, 3, "0.00541"), (2, 3, "2"), (None, 3, "-")])
def test_numbers_have_significant_digits_without_exponents(value, digits, text):
    assert measure.significant(value, digits) == text


# ---- wrong results

def test_results_that_differ_are_an_error(monkeypatch):
    monkeypatch.setattr(formula, "reference_covariance", lambda x: 1.001 * formula.san.covariance(x))
    with pytest.raises(AssertionError, match="san_pooling 12: ours and reference differ"):
        run("san_pooling")


@pytest.mark.parametrize("replaced", ["reference_covariance", "reference_attend"])
def test_the_reference_network_uses_the_replaced_operations(monkeypatch, replaced):
    right = getattr(formula, replaced)
    monkeypatch.setattr(formula, replaced, lambda x: 2 * right(x))
    with pytest.raises(AssertionError, match="san_forward"):
        run("san_forward")


def test_tiles_are_compared_with_the_whole_image_not_with_the_split(monkeypatch):
    row, notes = run("chop")
    assert float(row["difference"]) < 1e-5 and len(notes) == 1
    assert float(notes[0].split(" grey levels")[0].split()[-1]) > 1e-3 and "whole image at once takes 0 MB" in notes[0]
    monkeypatch.setattr(formula, "chop", lambda net, lr, memory: formula.reference_chop(net, lr))
    with pytest.raises(AssertionError, match="chop 32: ours and reference differ"):
        run("chop")


def test_a_wrong_image_from_the_cache_is_an_error(monkeypatch):
    get = data.cache.Cache.get
    monkeypatch.setattr(data.cache.Cache, "get", lambda self, *of: get(self, *of) // (2 if self.folder else 1))
    with pytest.raises(AssertionError, match="data 32: ours and reference differ"):
        run("data")


def test_nan_is_an_infinite_difference():
    assert measure.difference([torch.tensor([1.0, float("nan")])], [torch.tensor([1.0, 2.0])]) == float("inf")


# ---- the implementations

@pytest.mark.parametrize("height, width", [(37, 50), (64, 21)])
def test_the_four_way_split_is_exact_with_sufficient_overlap(monkeypatch, height, width):
    net, calls = EDSR(2, n_resblocks=1, n_feats=4), []
    net.register_forward_pre_hook(lambda _, args: calls.append(args[0][0, 0].numel()))
    lr = 255 * torch.rand(1, 3, height, width)
    with torch.no_grad():
        whole = net(lr)
        calls.clear()
        monkeypatch.setattr(formula, "SHAVE", net.receptive_field + 1)  # the halves of odd sides overlap by one pixel less
        monkeypatch.setattr(formula, "MIN_SIZE", 600)
        assert (formula.reference_chop(net, lr) - whole).abs().max() < 1e-3
        assert len(calls) in (16, 4) and max(calls) < 600
        monkeypatch.setattr(formula, "SHAVE", 1)
        assert (formula.reference_chop(net, lr) - whole).abs().max() > 1e-3


def test_with_cached_outputs_the_teacher_is_not_run():
    pair, calls = training.teacher_cache(32, CPU), []
    forward = EDSR.forward

    def counted(self, lr, features=False):
        calls.append((self.n_feats, tuple(lr.shape)))
        return forward(self, lr, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDSR, "forward", counted)
        pair.ours()
        assert calls == [(4, (2, 3, 8, 8))]
        pair.reference()
        assert calls[1:] == [(4, (2, 3, 8, 8)), (8, (2, 3, 8, 8))]
    pair.close()


def test_only_the_reference_decodes_files(monkeypatch):
    pair, read = training.data(32, CPU), []
    decode = data.dataset.read_photo
    monkeypatch.setattr(data.dataset, "read_photo", lambda path: read.append(path) or decode(path))
    assert [x.shape for x in pair.ours()] == [(5, 3, 8, 8), (5, 3, 32, 32)] and not read
    pair.reference()
    assert len(read) == 2 * 5
    pair.close()


def test_the_teacher_has_about_ten_times_the_flops_of_the_student():
    student, teacher = (count(EDSR(training.SCALE, **sizes))[0] for sizes in NETWORKS)
    assert 9.5 < teacher / student < 11


# ---- counters

@pytest.mark.parametrize("function, operations", [
    (lambda a: a @ a, 2 * 8**3),
    (lambda a: a.addmm_(a.clone(), a[:, :4] @ a[:4]), 2 * 8**3 + 2 * 8 * 4 * 8),
    (lambda a: a.clone()[None].baddbmm_(a[None], a[None]), 2 * 8**3),
    (lambda a: torch.nn.functional.scaled_dot_product_attention(a.view(1, 1, 8, 8), *a.repeat(2, 1, 2, 1).split(1)),
     2 * 2 * 8 * 16 * 8),
    (lambda a: torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3]), 2 * 9 * 36),
    (lambda a: a + a, 0),
])
def test_a_multiply_add_counts_as_two_operations(function, operations):
    with flops.flop_counter() as counter:
        function(torch.rand(8, 8))
    assert counter.get_total_flops() == operations


def test_peak_flops_are_those_of_the_fastest_of_ten_products(monkeypatch):
    times = iter((4.0, 2.0, 8.0, *[4.0] * 7))
    monkeypatch.setattr(flops, "run_time", lambda function, device: (function(), next(times))[1])
    assert flops.peak_flops("bf16", CPU) == flops.peak_flops("bf16", CPU) == 2 * 32**3 / 2


def test_array_memory_excludes_memory_mapped_files(tmp_path):
    np.save(tmp_path / "file.npy", np.zeros(1_000_000, np.uint8))

    def use(size):
        mapped = np.load(tmp_path / "file.npy", mmap_mode="r")
        return np.ones(size, np.uint8), mapped[:1000].sum()
    assert 500_000 <= memory.array_memory(lambda: use(500_000), CPU)[1] < 600_000


@pytest.mark.parametrize("count", [lambda f: memory.peak_memory(f, CPU)[1], memory.memory_from_shapes])
def test_memory_counts_living_tensors_forward_and_backward(count):
    x, weight = torch.rand(100), torch.rand(100, requires_grad=True)

    def forward():
        half = x.view(10, 10)[:5]  # a view of an input
        return (half + 1) * 2  # 200 bytes each, both alive

    assert count(forward) == 400
    assert count(lambda: x.mul_(1)) == 0
    # alive in the backward pass: the square, its sum and the incoming gradient (scalars), the parts of the gradient
    assert 800 <= count(lambda: torch.autograd.grad((weight * weight).sum(), weight)) <= 1700


def test_an_unknown_comparison(run_main):
    status, _, err = run_main("benchmark", "--cpu --only affinity+speed")
    assert status == 2 and len(err) == 1 and "--only speed: there is no such comparison; choose from affinity" in err[0]


def test_the_script_passes_flags_on(checkout):  # noqa: F811
    ran = subprocess.run(["bash", str(checkout / "scripts" / "benchmark.sh"), "--only", "chop"], capture_output=True,
                         text=True, check=True, cwd="/")
    assert ran.stdout.splitlines() == [str(checkout / "code" / "benchmark.py"), "--only", "chop"]
