"""Properties that hold for all inputs: of strings in flags, tile plans, label-consistency operations, checkpoints, sizes."""
import argparse
import math
import re
from contextlib import suppress
from functools import cache
from operator import itemgetter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import inference
import loss
import option
import option_types
from data import degrade, teacher_cache
from data.dataset import Batches
from loss import Output, consistency
from model import NETWORKS, CheckpointError, load_model, save_header
from option_types import Stage
from system.errors import UserError

settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=40,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("ci")

# ---- strings in flags

ALMOST = st.text("0123456789.eE+-*,/[]()=~_ \0aABDSTxit\u0663\u00e9\n", max_size=16)  # near to what the parsers accept
TEXT = ALMOST | st.text(max_size=16)
WEIGHTS = st.floats(0, 1e30)
TYPES = {action.option_strings[0]: action.type for action in option.make_parser()._actions if action.type}
PARSERS = sorted({parse.__name__: parse for parse in TYPES.values()}.items())
TEXT_FLAGS = sorted(action.option_strings[0] for action in option.make_parser()._actions
                    if action.type or (action.nargs is None and not action.choices))


@given(st.lists(st.tuples(WEIGHTS, st.sampled_from(sorted(loss.TERMS))), min_size=1, unique_by=itemgetter(1)),
       st.sampled_from(["+", " + "]))
def test_a_loss_string_is_read_as_it_was_written(terms, plus):
    assert option_types.parse_loss(plus.join(f"{weight!r}*{name}" for weight, name in terms)) == terms
    assert option_types.parse_loss(plus.join(name for _, name in terms)) == [(1, name) for _, name in terms]


@given(TEXT)
def test_any_text_is_a_loss_string_or_a_value_error(text):
    try:
        terms = option_types.parse_loss(text)
    except ValueError:
        return
    assert terms and all(0 <= weight < math.inf and re.fullmatch(r"\w+", name) for weight, name in terms)
    assert len({name for _, name in terms}) == len(terms)


@given(TEXT)
def test_any_text_is_a_loss_or_a_user_error(text):
    with suppress(UserError, ValueError):
        assert loss.parse(text)


@pytest.mark.parametrize("parse", [parse for _, parse in PARSERS], ids=[name for name, _ in PARSERS])
@settings(max_examples=30)
@given(text=TEXT)
def test_any_text_is_a_value_or_an_argument_error(parse, text):
    try:
        parse(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        assert str(error)


@given(TEXT)
def test_any_text_is_labelled_files_or_a_user_error(text):
    try:
        nets = option_types.parse_labelled(text)
    except UserError:
        return
    assert all(label and path for label, path in nets.items())


@settings(max_examples=100)
@given(st.sampled_from(TEXT_FLAGS), TEXT)
def test_a_command_line_is_read_or_ends_in_one_line_and_status_2(capsys, flag, text):
    try:
        option.parse([f"{flag}={text}"])
    except SystemExit as ended:
        err = capsys.readouterr().err
        assert ended.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@given(st.lists(st.sampled_from(["RCAN", "EDSR", "a b", "x.pt"]), min_size=1))
def test_the_three_ways_to_write_a_list_are_one(names):
    parse_list = TYPES["--data_train"]
    assert parse_list("+".join(names)) == parse_list(",".join(names)) == parse_list(f"[{', '.join(names)}]") == names


@given(st.lists(st.integers(1, 10**9), min_size=1, unique=True).map(sorted))
def test_numbers_are_read_as_they_were_written(numbers):
    text = "-".join(map(str, numbers))
    assert TYPES["--decay"](text) == TYPES["--history_every"](text) == numbers
    iterations = TYPES["--decay"](f"{text}it")
    assert iterations == numbers and repr(iterations) == f"{text}it"


@given(st.permutations(range(4)), st.integers(1, 4))
def test_features_are_read_as_they_were_written(features, number):
    assert TYPES["--features"](str(features[:number])) == features[:number]


# ---- tiles

ALIGN = st.sampled_from([1, 2, 8])
SIZE = st.integers(1, 200)


def check_cut(spans, size, tile_pad, align):
    """Assert that spans cover 0..size once, see tile_pad beyond them or the border, and are equally large with it."""
    starts, stops = zip(*(span[:2] for span in spans))
    assert starts == (0, *stops[:-1]) and stops[-1] == size
    extents = [last - first for _, _, first, last in spans]
    assert max(extents) - min(extents) < align
    for start, stop, first, last in spans:
        assert 0 <= first <= start < stop <= last <= size and first % align == 0
        assert first == 0 or start - first >= tile_pad
        assert last == size or last - stop >= tile_pad


@given(SIZE, st.integers(1, 20), st.integers(0, 8), ALIGN)
def test_tiles_cover_an_axis_once(size, tiles, pads, align):
    check_cut(inference._divide(size, tiles * align, pads * align, align), size, pads * align, align)


@given(SIZE, st.integers(0, 8), ALIGN)
def test_each_cut_says_what_it_computes(size, pads, align):
    cuts = inference._divisions(size, pads * align, align)
    assert len(cuts[0][2]) == 1
    for total, window, spans in cuts:
        check_cut(spans, size, pads * align, align)
        assert total == len(spans) * window and all(last - first <= window for _, _, first, last in spans)


@given(SIZE, SIZE, st.integers(0, 4), ALIGN, st.integers(1, 50_000))
def test_the_tiles_keep_to_the_limit_or_are_the_smallest(height, width, pads, align, limit):
    area, rows, columns = inference._choose_tiles(height, width, pads * align, align, limit)
    check_cut(rows, height, pads * align, align)
    check_cut(columns, width, pads * align, align)
    assert max((bottom - top) * (right - left) for _, _, top, bottom in rows for _, _, left, right in columns) <= area
    smallest = math.prod(min(cut[1] for cut in inference._divisions(size, pads * align, align)) for size in (height, width))
    assert area <= limit or area == smallest


class Exact(nn.Module):
    """Two convolutions of whole numbers and a pattern of period `window`: exact in float32, with a receptive field of 2."""
    scale = receptive_field = 2

    def __init__(self, window):
        super().__init__()
        self.window = window
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 12, 3, padding=1)])
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()

    def forward(self, x):
        rows, columns = (torch.arange(size) % self.window for size in x.shape[2:])
        return nn.functional.pixel_shuffle(self.convs[1](self.convs[0](x) + rows[:, None] + 3 * columns), 2)


def image(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), ALIGN)
def test_the_result_in_tiles_is_that_of_the_whole(images, height, width, tile, window):
    net, lr = Exact(window), image(images, 3, height, width)
    assert torch.equal(inference.chop(net, lr, tile=tile), net(lr))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2000), st.integers(1, 4), ALIGN)
def test_the_result_of_the_cheapest_cut_is_that_of_the_whole(height, width, limit, batch, window):
    net, lr = Exact(window), image(1, 3, height, width)
    _, rows, columns = inference._choose_tiles(height, width, inference._round_up(2, window), window, limit)
    with torch.no_grad():
        sr = inference._run_tiles(torch.empty(1, 3, 2 * height, 2 * width), net, lr, rows, columns, batch)
        assert torch.equal(sr, net(lr))


# ---- label consistency

@st.composite
def batches(draw):
    """Images of whole numbers N x 3 x H x W, and operations for each; all or none transposed where they are not square."""
    number, height = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    width = height if draw(st.booleans()) else draw(st.integers(1, 9))
    chosen = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=number, max_size=number)))
    if height != width:
        chosen[:, consistency.TRANSPOSE] = chosen[:1, consistency.TRANSPOSE]
    return image(number, 3, height, width), chosen


def without_orientation(x, scale=2):
    """A sum over each pixel's four neighbours, enlarged: it commutes with flips, transposes and inverted colours."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    total = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    return (total / 4).repeat_interleave(scale, 2).repeat_interleave(scale, 3)


@given(batches())
def test_what_is_perturbed_can_be_restored(batch):
    images, chosen = batch
    assert torch.equal(consistency.restore(consistency.perturb(images, chosen, 255), chosen, 255), images)
    moved = chosen.clone()
    moved[:, consistency.INVERT] = False
    assert torch.equal(consistency.restore_features(consistency.perturb(images, moved, 255), chosen), images)


@given(batches())
def test_a_function_without_orientation_gives_the_same_on_perturbed_images(batch):
    images, chosen = batch
    result = consistency.restore(without_orientation(consistency.perturb(images, chosen, 255)), chosen, 255)
    assert torch.equal(result, without_orientation(images))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 0.3, 1]), st.integers(0, 99))
def test_every_draw_can_be_applied_and_undone(number, height, width, p, seed):
    torch.manual_seed(seed)
    images = [image(number, 3, height, width), image(number, 3, 4, 4)]
    chosen = consistency.draw(images[0], p)
    assert chosen.shape == (number, 4) and (0 < p < 1 or chosen.all() == chosen.any() == bool(p))

    def forward(inputs):
        return [Output(without_orientation(x), [x]) for x in inputs]

    for output, x in zip(consistency.with_label_consistency(forward, images, len(images) * [p], 255), images):
        assert torch.equal(output.sr, without_orientation(x)) and output.features[0].shape == x.shape


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_mean_over_orientations_of_a_function_without_is_its_result(height, width):
    lr = image(1, 3, height, width)
    assert torch.equal(inference.ensemble(without_orientation, lr), without_orientation(lr))


# ---- checkpoints

SMALL = {"EDSR": dict(n_resblocks=2, n_feats=4), "RCAN": dict(n_resgroups=1, n_resblocks=1, n_feats=4, reduction=2),
         "CARN": dict(n_feats=4), "CARN_M": dict(n_feats=4), "RDN": dict(G0=4, RDNconfig="2,2,4"),
         "IMDN": dict(n_feats=16, n_modules=2), "SAN": dict(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=2),
         "Compact": dict(n_feats=4, n_convs=2), "SPAN": dict(n_feats=4),
         "SwinIR": dict(n_feats=4, depths=[1], num_heads=[1], window_size=4, mlp_ratio=1),
         "NAFNet": dict(n_feats=2, enc_blk_nums=[1], dec_blk_nums=[2]),
         "Restormer": dict(n_feats=2, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 1, 2, 2]),
         "RRDB": dict(n_feats=4, num_block=1, num_grow_ch=2)}
SCALE = dict(NAFNet=1, Restormer=1)  # of the others 2


@pytest.fixture(scope="module")
def states():
    """states(network) -> (header, state) of a small one of that kind; a function, as Hypothesis prints arguments whole."""
    @cache
    def make(name):
        net = NETWORKS[name][0](scale=SCALE.get(name, 2), **SMALL[name])
        return save_header(net), net.state_dict()
    return make


@st.composite
def changes(draw):
    """A function that changes the names and shapes of a state at random places."""
    places = draw(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["drop", "rename", "shape", "add"]),
                                     st.lists(st.integers(0, 5), max_size=5)), min_size=1, max_size=4))

    def change(state):
        state = dict(state)
        for place, what, shape in places:
            name = sorted(state)[place % len(state)]
            value = state.pop(name) if what in ("drop", "rename") else state[name]
            if what == "rename":
                state[name.replace("0", "x", 1)] = value
            elif what == "shape":
                state[name] = torch.zeros(shape)
            elif what == "add":
                state[name.replace("0", "7")] = torch.zeros(shape)
            if not state:
                break
        return state
    return change


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=15)
@given(change=changes(), headed=st.booleans())
def test_a_changed_checkpoint_is_loaded_or_refused(states, tmp_path, name, change, headed):
    header, state = states(name)
    path = tmp_path / "changed.pt"
    torch.save({**header, "params": change(state)} if headed else change(state), path)
    try:
        load_model(path, scale=SCALE.get(name, 2))
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@given(st.dictionaries(st.text("abcdhtuy0123._", max_size=12) | st.sampled_from(["head.0.weight", "conv_first.weight"]),
                       st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5))
def test_random_names_are_no_network(tmp_path, shapes):
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "random.pt")
    with pytest.raises(CheckpointError, match=r"random\.pt: "):
        load_model(tmp_path / "random.pt")


# ---- images and batches

@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8))
def test_downscaling_crops_to_a_multiple_and_divides(height, width, scale):
    hr = image(height, width, 3).byte().numpy()
    cropped = degrade.crop_to_multiple(hr, scale)
    assert cropped.shape == (height // scale * scale, width // scale * scale, 3)
    assert np.array_equal(cropped, hr[:len(cropped), :cropped.shape[1]])
    if min(cropped.shape) == 0:
        with pytest.raises(ValueError, match="smaller than the scale"):
            degrade.downscale(hr, scale)
        return
    lr = degrade.downscale(hr, scale)
    assert lr.dtype == np.uint8 and lr.shape == (height // scale, width // scale, 3)
    assert np.array_equal(lr, degrade.downscale(cropped, scale))
    batch = torch.from_numpy(np.stack([hr, 255 - hr])).permute(0, 3, 1, 2)
    assert np.array_equal(degrade.downscale_batch(batch, scale)[0].permute(1, 2, 0).numpy(), lr)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 4), st.integers(0, 255))
def test_resizing_keeps_a_constant_image(height, width, scale, value):
    lr = np.full((height, width, 3), value, np.uint8)
    sr = degrade.upscale(lr, scale)
    assert sr.shape == (height * scale, width * scale, 3) and (sr == value).all()
    assert np.array_equal(degrade.downscale(sr, scale), lr)


@given(st.lists(st.floats(-127, 383, width=32), min_size=3, max_size=12))
def test_kept_teacher_outputs_are_rounded_by_a_256th_at_most(values):
    assume(len(values) % 3 == 0)
    sr = torch.tensor(values).view(3, 1, -1)
    kept = teacher_cache.decode(torch.from_numpy(teacher_cache.encode(sr))).permute(2, 0, 1)
    assert (kept - sr).abs().max() <= 1 / 256


@given(st.integers(0, 20), st.integers(0, 10), st.integers(1, 4), st.integers(1, 4))
def test_the_processes_parts_make_up_each_batch(start, number, parts, size):
    stop, batch_size = start + number, parts * size
    samplers = [Batches(start, stop, [Stage(0, 0, 16, batch_size)], part, parts) for part in range(parts)]
    assert {len(sampler) for sampler in samplers} == {number}
    batches = [[index for shard in shards for index in shard] for shards in zip(*samplers)]
    assert batches == [list(range(k * batch_size, (k + 1) * batch_size)) for k in range(start, stop)]
