"""Degraded inputs: JPEG as Pillow's, kernels and filters as closed forms, statistics, exact repetition, runs."""
import io
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import skimage.data
import torch
from PIL import Image

import checkpoint
import option
from checkpoint import save_model
from data import Crops, Images, degradation, degrade, filters, jpeg
from data.degradation import Degradation, Draws
from model.compact import Compact
from option_types import degradation_steps

ALL = "noise25", "noise0-55", "jpeg10-40", "blur", "rain", "blur+noise10+jpeg50-90", "noise5+blur3", "realesrgan"


def to_batch(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def photo():
    """The photo of a cat, 3 x 120 x 132."""
    return to_batch(skimage.data.chelsea()[60:180, 100:232])[0]


@pytest.fixture
def draws():
    return Draws(range(401), torch.device("cpu"))


def degraded(description, scale, hr, seeds):
    return Degradation(description, scale).apply(degrade.downscale_batch(hr, scale) if scale > 1 else hr, hr, seeds)


# ---- JPEG

def by_pillow(image, quality):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return Image.open(stream)


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [(96, 128), (57, 43), (40, 17)])
def test_JPEG_is_that_of_libjpeg(quality, size):
    image = skimage.data.astronaut()[30:30 + size[0], 200:200 + size[1]]
    file = by_pillow(image, quality)
    found = jpeg.compress(to_batch(image).float(), torch.tensor([float(quality)]))[0].permute(1, 2, 0).numpy()
    difference = found - np.asarray(file).astype(float)
    assert found.shape == image.shape and np.abs(difference).mean() < 1 and abs(difference.mean()) < 0.3
    psnr, expected = (10 * math.log10(255 ** 2 / ((x - image.astype(float)) ** 2).mean()) for x in (found, np.asarray(file)))
    assert psnr == pytest.approx(expected, abs=0.15)
    for index, base in enumerate((jpeg.LUMINANCE, jpeg.CHROMINANCE)):
        assert jpeg.tables(torch.tensor([float(quality)]), base).tolist()[0] == list(file.quantization[index])


def test_JPEG_has_a_quality_for_each_image_and_rounds_before_and_after(photo):
    images = photo[None].float().repeat(3, 1, 1, 1)
    found = jpeg.compress(images + 0.3, torch.tensor([10, 90, 40]))
    alone = torch.cat([jpeg.compress(images[:1], torch.tensor([quality])) for quality in (10, 90, 40)])
    assert torch.equal(found, alone) and torch.equal(found, found.round()) and found.min() >= 0 and found.max() <= 255


# ---- kernels and filters

@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
def test_kernels_are_the_closed_forms():
    sigma, angle, beta = torch.tensor([[0.7, 2.5], [3.0, 0.3]]), torch.tensor([0.4, -2.0]), torch.tensor([0.6, 3.1])
    radius, cutoff = torch.tensor([3.0, 10.0]), torch.tensor([1.1, 3.0])
    y, x = np.mgrid[-10:11, -10:11]
    for k in range(2):
        rotation = np.array([[math.cos(angle[k]), -math.sin(angle[k])], [math.sin(angle[k]), math.cos(angle[k])]])
        inverse = np.linalg.inv(rotation @ np.diag(sigma[k].numpy() ** 2) @ rotation.T)
        q = np.einsum("iyx,ij,jyx->yx", np.stack([x, y]), inverse, np.stack([x, y])) ** beta[k].item()
        r = np.hypot(x, y)
        with np.errstate(invalid="ignore"):
            low_pass = cutoff[k].item() * scipy.special.j1(cutoff[k].item() * r) / (2 * np.pi * r)
        low_pass[10, 10] = cutoff[k].item() ** 2 / (4 * np.pi)
        inside = np.maximum(abs(x), abs(y)) <= radius[k].item()
        for found, expected in (
                (filters.elliptic_kernels("gaussian", sigma, angle, beta, radius, 10), np.exp(-q / 2)),
                (filters.elliptic_kernels("plateau", sigma, angle, beta, radius, 10), 1 / (1 + q)),
                (filters.sinc_kernels(cutoff, radius, 10), low_pass)):
            expected = expected * inside
            assert np.abs(found[k].numpy() - expected / expected.sum()).max() < 1e-6  # PyTorch's J1 has 7 digits


@pytest.mark.usefixtures("float64")
def test_kernels_of_motion():
    steps = torch.zeros(3, 600)
    steps[1] += math.pi / 2
    steps[2, 300:] = math.pi / 2  # round a corner
    across, down, corner = filters.motion_kernels(torch.tensor([7.0, 7.0, 12.0]), steps, 8)
    assert torch.allclose(across, down.T, atol=1e-12) and across[:8].abs().max() < 1e-12
    assert torch.allclose(across[8, 5:12], torch.full((7,), 1 / 7), atol=0.02) and across[8, :4].abs().max() < 1e-12
    place = torch.arange(-8.0, 9)
    for kernel in (across, down, corner):
        assert kernel.sum().item() == pytest.approx(1) and kernel.min() >= 0
        assert abs(kernel.sum(0) @ place) < 1e-9 and abs(kernel.sum(1) @ place) < 1e-9  # the image does not move
    columns = torch.where(corner.sum(0) > 1e-3)[0]
    assert columns.max() - columns.min() in (6, 7)


def test_random_kernels_have_sum_1_and_the_published_families(draws, monkeypatch):
    chosen = []
    elliptic = degradation.elliptic_kernels
    monkeypatch.setattr(degradation, "elliptic_kernels", lambda *values: chosen.append(values) or elliptic(*values))
    kernels = degradation.blur_kernels((0.2, 3), draws)
    assert kernels.shape == (400, 21, 21) and torch.allclose(kernels.sum((1, 2)), torch.ones(400), atol=1e-4)
    families = torch.stack([(kernels == elliptic(*values)).all((1, 2)) for values in chosen])
    assert (families.sum(0) <= 1).all()
    found = families.float().mean(1)
    for part, expected in zip(found.tolist(), (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)):
        assert part == pytest.approx(0.9 * expected, abs=0.06)
    assert found.sum().item() == pytest.approx(0.9, abs=0.05)
    for _, sigma, angle, beta, radius, _ in chosen:
        assert sigma.min() >= 0.2 and 2.8 < sigma.max() <= 3 and angle.abs().max() <= math.pi
        assert set(radius.tolist()) == set(range(3, 11)) and beta.min() >= 0.5 and beta.max() <= 4
    sincs = (kernels < -1e-4).any(2).any(1).float().mean().item()
    assert sincs == pytest.approx(0.1, abs=0.05)
    final = degradation.final_kernels(draws)
    assert (final[:, 10, 10] == 1).float().mean().item() == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("padding, mode", [("reflect", "mirror"), ("edge", "nearest")])
@pytest.mark.parametrize("size", [(20, 31), (5, 3)])
def test_filters_are_each_images_own(padding, mode, size):
    images, kernels = torch.rand(3, 2, *size, dtype=torch.float64), torch.rand(3, 7, 5, dtype=torch.float64)
    found = filters.filter_images(images.contiguous(memory_format=torch.channels_last), kernels, padding)
    for k, image in enumerate(images):
        for c, plane in enumerate(image):
            expected = scipy.ndimage.correlate(plane.numpy(), kernels[k].numpy(), mode=mode)
            assert np.abs(found[k, c].numpy() - expected).max() < 1e-12


def test_the_unsharp_mask(photo):
    found = filters.usm_sharpen(photo[None].double())[0].numpy()
    for plane, sharp in zip(photo.double().numpy(), found):
        blurred = scipy.ndimage.gaussian_filter(plane, 8, mode="mirror", radius=25)
        mask = scipy.ndimage.gaussian_filter((abs(plane - blurred) > 10).astype(float), 8, mode="mirror", radius=25)
        expected = mask * np.clip(plane + 0.5 * (plane - blurred), 0, 255) + (1 - mask) * plane
        assert np.abs(sharp - expected).max() < 1e-3


# ---- statistics

@pytest.mark.parametrize("description, low, high", [("noise25", 25, 25), ("noise0-55", 0, 55), ("noise2.5", 2.5, 2.5)])
def test_noise_has_its_strength_and_no_bias(description, low, high):
    lr = torch.full((300, 3, 16, 16), 128, dtype=torch.uint8)
    noise = degraded(description, 1, lr, range(301))[0].float() - 128
    sigma = noise.std((1, 2, 3))
    assert noise.mean().abs() < 0.2 and sigma.mean().item() == pytest.approx((low + high) / 2, rel=0.1)
    assert sigma.min() >= 0.9 * low - 0.1 and sigma.max() <= 1.1 * high
    assert high == low or (sigma.min() < 5 and sigma.max() > 48)
    channels = noise.flatten(2)
    assert (channels[:, 0] * channels[:, 1]).mean().abs() < 0.02 * high ** 2


def test_poisson_noise_grows_with_brightness_and_is_gray_where_chosen(draws):
    levels = torch.arange(256.0).repeat_interleave(12).view(1, 1, 48, 64).expand(400, 3, 48, 64)
    gray = torch.arange(400) % 2 == 0
    noise = degradation.add_noise(levels, degradation.poisson_noise(levels, gray, draws), torch.ones(400), gray) - levels
    variances = noise.pow(2).mean((0, 1)).view(256, 12).mean(1)
    assert noise.mean().abs() < 0.02
    assert torch.allclose(variances[10:], torch.arange(256.0)[10:] * 255 / 256, rtol=0.12)
    different = (noise[:, 0] - noise[:, 2]).abs().mean((1, 2)) > 1
    assert torch.equal(different, ~gray)


def test_rain_is_bright_and_sparse_and_blur_keeps_the_mean(photo):
    hr = photo.repeat(24, 1, 1, 1)
    rainy = degraded("rain", 1, hr, range(25))[0].float() - hr
    covered = (rainy.amax(1) > 2).float().mean((1, 2))
    assert rainy.min() >= 0 and covered.min() > 0.005 and covered.max() < 0.3 and (rainy.amax((1, 2, 3)) > 30).all()
    blurred = degraded("blur", 1, hr, range(25))[0].float()
    assert (blurred.mean((1, 2, 3)) - hr.float().mean((1, 2, 3))).abs().max() < 1
    detail = (blurred - blurred.roll(1, 3)).abs().mean((1, 2, 3)) + (blurred - blurred.roll(1, 2)).abs().mean((1, 2, 3))
    original = hr[:1].float()
    assert (detail < sum((original - original.roll(1, axis)).abs().mean() for axis in (2, 3))).all()
    assert len(detail.unique()) > 20


def test_the_order_of_a_sum_and_the_place_of_the_downscaling(photo):
    hr, seeds = photo[None], [3, 4]
    first = degraded("blur5+jpeg30", 2, hr, seeds)[0]
    blurred = degraded("blur5", 2, hr, seeds)[0]
    assert torch.equal(first, jpeg.compress(blurred.float(), torch.tensor([30.0])).to(torch.uint8))
    lr = degrade.downscale_batch(hr, 2)
    assert torch.equal(degraded("jpeg30", 2, hr, seeds)[0], jpeg.compress(lr.float(), torch.tensor([30.0])).to(torch.uint8))
    assert not torch.equal(degraded("noise9+jpeg30", 2, hr, seeds)[0], degraded("jpeg30+noise9", 2, hr, seeds)[0])


# ---- repetition

@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("description", ALL)
def test_sizes_and_exact_repetition(description, scale, photo):
    hr = torch.stack([photo, photo.flip(2)])
    lr, target = degraded(description, scale, hr, [5, 6, 7])
    assert lr.shape == (2, 3, 120 // scale, 132 // scale) and lr.dtype == target.dtype == torch.uint8
    assert torch.equal(target, hr) == (description != "realesrgan")
    assert torch.equal(lr, degraded(description, scale, hr, [5, 6, 7])[0])
    assert description == "jpeg10-40" or not torch.equal(lr, degraded(description, scale, hr, [5, 16, 17])[0])
    plain = degrade.downscale_batch(hr, scale) if scale > 1 else hr
    assert 10 * math.log10(255 ** 2 / (lr.float() - plain.float()).pow(2).mean()) > 12  # still the same images


@pytest.mark.parametrize("description", ALL)
def test_an_image_does_not_depend_on_the_others_of_its_batch(description, photo):
    hr = torch.stack([photo, photo.flip(2), photo.flip(1)])
    together = degraded(description, 2, hr, [5, 6, 7, 8])[0].int()
    alone = torch.cat([degraded(description, 2, hr[k:k + 1], [5, 6 + k])[0] for k in range(3)]).int()
    assert ((together - alone).abs() > 1).float().mean() < 1e-3  # sums of another order may be rounded otherwise


def test_a_batch_takes_its_seeds_from_the_generator_of_the_run(photo):
    hr = torch.stack([photo, photo])
    make = Degradation("noise20", 1)
    torch.manual_seed(3)
    state, first, second = torch.get_rng_state(), make(hr, hr)[0], make(hr, hr)[0]
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.set_rng_state(state)
    assert torch.equal(make(hr, hr)[0], first)


# ---- test sets

def test_inputs_of_tests_are_the_same_in_every_run_and_differ_between_images(tiny_data, tmp_path):
    found = []
    for number, more in enumerate(("", "--seed 7", "--ext img")):
        args = option.parse(f"--dir_data {tiny_data} --scale 2 --degrade blur+noise20 --dir_cache {tmp_path / str(number)} "
                            f"{more}".split())
        images = Images("tiny", args, train=False)
        images.prepare()
        torch.manual_seed(number)
        found.append([images.lr(index) for index in (3, 0, 1, 2)])
        assert torch.initial_seed() == number and images.lr(0).shape == (28, 32, 3)
    assert all(np.array_equal(a, b) for others in found[1:] for a, b in zip(found[0], others))
    args = option.parse(f"--dir_data {tiny_data} --scale 2 --degrade noise20 --dir_cache {tmp_path / '0'}".split())
    other, plain = Images("tiny", args, train=False), Images("tiny", args, train=True)
    noise = [other.lr(index).astype(float) - plain.lr(index) for index in range(4)]
    assert all(15 < one.std() < 25 for one in noise) and abs((noise[0] * noise[1]).mean()) < 40
    assert not np.array_equal(other.lr(0), found[0][1])  # of another degradation, from the same cache


def test_at_scale_1_the_input_is_HR_degraded(tiny_data, tmp_path):
    args = option.parse(f"--dir_data {tiny_data} --data_train tiny --scale 1 --patch_size 24 --degrade jpeg30 --dir_cache "
                        f"{tmp_path}".split())
    images = Images("tiny", args, train=False)
    images.prepare()
    difference = images.lr(2) - np.asarray(by_pillow(images.hr(2), 30)).astype(float)
    assert np.abs(difference).mean() < 0.6
    lr, hr = Crops(args)[0]
    assert torch.equal(lr, hr)  # the batch is degraded on its device


# ---- runs

@pytest.fixture
def line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "draw_curve", lambda *_: b"")  # takes longer than the training
    torch.manual_seed(7)
    save_model(Compact(2, n_feats=4, n_convs=1), tmp_path / "teacher.pt")
    return (f"--cpu --n_threads 0 --dir_data {tiny_data} --dir_cache {tmp_path / 'cache'} --data_test tiny --model Compact "
            f"--n_feats 4 --n_convs 1 --scale 2 --patch_size 24 --batch_size 4 --data_train tiny --test_every 2 "
            f"--loss 1*DS+1*TS --teacher {tmp_path / 'teacher.pt'} --lr 1e-3 ")


@pytest.mark.parametrize("description", ["blur+rain+noise0-55+jpeg10-40", "realesrgan"])
def test_a_run_resumes_exactly(run_main, line, tmp_path, description):
    line += f"--degrade {description} "
    whole, parts = (line + f"--ckp_dir {tmp_path / name} " for name in ("whole", "parts"))
    assert run_main("train", whole + "--epochs 2")[0] == 0
    assert run_main("train", parts + "--epochs 1")[0] == 0
    assert run_main("train", parts + "--epochs 2 --resume 1")[0] == 0
    first, second = (torch.load(tmp_path / name / "state.pt", weights_only=True)["student"] for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    scores = []
    for name in ("whole", "parts"):
        latest = tmp_path / name / "model" / "model_latest.pt"
        status, out, _ = run_main("test", f"--ckp_path {latest} --degrade {description} {line.partition('--model')[0]}")
        log = (tmp_path / name / "log.txt").read_text().splitlines()
        scores += [[text.split()[:4] for text in lines if text.startswith("tiny")][-1] for lines in (out, log)]
        assert status == 0
    assert scores[:3] == scores[1:]


@pytest.mark.parametrize("more, words", [
    ("--cache_teacher", "best_running"), ("--eco", "not degraded"), ("--upcycle zoom_in", "not degraded"),
    ("--pair_dirs blur/sharp", "folders of degraded inputs")])
def test_what_a_random_degradation_excludes(run_main, line, more, words, tmp_path):
    status, _, err = run_main("train", line + f"--degrade noise25 {more} --ckp_dir {tmp_path / 'run'}")
    assert status == 2 and len(err) == 1 and words in err[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("description, words", [
    ("noise", "number in 0..255"), ("noise-5", "number in 0..255"), ("noise0", "noise0"), ("noise300", "number in 0..255"),
    ("noise40-10", "range"), ("noise1.2.3", "number"), ("noise1e5", "noise25"), ("noise25-", "noise25-"),
    ("jpeg200", "whole number in 1..100"), ("jpeg0-10", "whole number"), ("jpeg40.5", "whole number"), ("jpeg", "whole"),
    ("blur0", "1..99"), ("blur100", "1..99"), ("rain5", "no number"), ("foo", "'foo' is not a degradation"),
    ("noise5+", "''"), ("+", "''"), ("realesrgan+noise5", "sum"), ("Noise25", "'Noise25'"), ("+".join(9 * ["rain"]), "8"),
    ("noise\u0663", "not a degradation"), ("blur 5", "not a degradation")])
def test_a_wrong_description_is_one_line(description, words, capsys):
    with pytest.raises(SystemExit) as ended:
        option.parse(["--degrade", description])
    err = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(err) == 1 and words in err[0] and "--degrade" in err[0]


def test_descriptions():
    assert degradation_steps("blur+noise0-55+jpeg40") == [("blur", 5, 15), ("noise", 0, 55), ("jpeg", 40, 40)]
    assert degradation_steps("rain+blur7") == [("rain", 0, 0), ("blur", 7, 7)]


def test_the_presets_have_the_published_weights_in_any_range_of_the_images():
    args = option.parse(["--template", "RealESRGAN_student+Compact_S", "--rgb_range", "1"])
    assert (args.loss, args.lr, args.gan_net, args.degrade) == ("1*DS+1*TS+1*VGG+0.1*GAN", 1e-4, "unet", "realesrgan")
    assert option.parse(["--template", "RealESRGAN_student"]).loss == "1*DS+1*TS+255*VGG+25.5*GAN"
    assert option.parse(["--template", "RealESRNet_student", "--degrade="]).degrade == ""
