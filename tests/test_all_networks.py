"""Every network of NETWORKS at a small size, which includes networks that are added to it."""
import sys
from types import SimpleNamespace

import pytest
import torch

import inference
import option
from checkpoint import save_model
from loss import Context, LossInputs, Output, build_loss
from model import NETWORKS, CheckpointError, load_model, make_model
from model.edsr import EDSR
from model.layout import recognise
from model.swinir import SwinIR

SMALL = dict(n_resgroups=2, n_resblocks=1, n_feats=16, reduction=4, n_modules=2, n_convs=3, G0=16, RDNconfig="2,2,8",
             depths=[2, 1], num_heads=[2, 2], window_size=4, enc_blk_nums=[1, 2], middle_blk_num=1, dec_blk_nums=[1, 1],
             num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 2, 2, 4], num_block=2, num_grow_ch=8)
UPSCALING = [name for name, (network, _) in NETWORKS.items() if 2 in network.scales]
WITHOUT_LAYOUT = "EDSR", "RCAN", "SAN", "CARN", "CARN_M"  # at scale 1, at which they were not released
each_network = pytest.mark.parametrize("name", NETWORKS)
each_scale = pytest.mark.parametrize("name, scale", [(name, scale) for name, (network, _) in NETWORKS.items()
                                                     for scale in network.scales])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(name, scale=None, **sizes):
    scale = scale or (2 if name in UPSCALING else 1)
    if (name, scale) == ("SwinIR", 1):
        sizes["upsampler"] = ""
    net = make_model(name, SimpleNamespace(scale=scale, **{**SMALL, **sizes})).eval()
    for key, parameter in net.named_parameters():
        if key.endswith(("beta", "gamma")) and parameter.ndim == 4:  # of NAFNet, whose new blocks compute the identity
            torch.nn.init.normal_(parameter)
    return net


def scale_flags(scale):
    return f"--scale {scale}" + " --degrade noise25" * (scale == 1)


def test_every_network_can_be_given_as_a_flag():
    assert tuple(NETWORKS) == option.NETWORKS


@each_scale
@pytest.mark.parametrize("height, width", [(12, 8), (7, 5), (1, 1)])
def test_shapes(name, scale, height, width):
    net = small(name, scale)
    with torch.no_grad():
        sr, feature_maps = net(255 * torch.rand(2, 3, height, width), features=True)
    assert sr.shape == (2, 3, scale * height, scale * width)
    assert [x.shape for x in feature_maps] == [(2, channels, height, width) for channels in net.feature_channels]
    assert sr.isfinite().all()


@each_scale
def test_a_saved_network_is_loaded_bit_for_bit(tmp_path, name, scale):
    net, x = small(name, scale), 255 * torch.rand(1, 3, 9, 7)
    save_model(net, tmp_path / "own.pt")
    torch.save({"params": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "bare.pt")
    with torch.no_grad():
        for file in ("own.pt", "bare.pt") if scale > 1 or name not in WITHOUT_LAYOUT else ("own.pt",):
            loaded = load_model(tmp_path / file)
            assert type(loaded) is type(net) and loaded.config == net.config
            assert torch.equal(loaded(x), net(x))


@each_network
def test_its_state_has_no_layout_of_another_network(name):
    state = small(name).state_dict()
    assert [other for other, (_, layouts) in NETWORKS.items() if recognise(state, layouts)] == [name]


@each_network
def test_bf16_is_close(name):
    net, x = small(name), 255 * torch.rand(1, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = net(x)
    with torch.no_grad():
        expected = net(x)  # an untrained SPAN puts out values far above 255
    assert low.dtype == torch.float32 and torch.allclose(low, expected, atol=0.02 * max(255, expected.abs().max()))


@each_network
def test_it_can_be_the_teacher_of_a_small_edsr(name):
    teacher = small(name).requires_grad_(False)
    student = EDSR(teacher.scale, n_resblocks=3, n_feats=8)
    criterion = build_loss("1*DS+1*TS+10*SA+1*fitnet", Context(SimpleNamespace(features=[1, 2, 3]), student, [teacher]))
    lr, hr = 255 * torch.rand(2, 3, 12, 12), 255 * torch.rand(2, 3, *2 * [12 * teacher.scale])
    total, values = criterion(LossInputs(lr, hr, Output(*student(lr, features=True)), Output(*teacher(lr, features=True))))
    total.backward()
    assert values.isfinite().all() and (values > 0).all()
    for key, parameter in [*student.named_parameters(), *criterion.named_parameters()]:
        assert not parameter.requires_grad or (parameter.grad.isfinite().all() and parameter.grad.any()), key


@each_network
def test_it_trains_with_checkpoints_of_other_networks_as_teachers(run_main, tiny_data, tmp_path, name):
    scale = small(name).scale
    others = [other for other in (UPSCALING if scale > 1 else ("NAFNet", "Restormer", "Compact")) if other != name][:2]
    for other in others:
        torch.save(small(other, scale).state_dict(), tmp_path / f"{other}.pth")
    sizes = " ".join(f"--{key} {str(value).replace(' ', '')}" for key, value in SMALL.items())
    status, _, _ = run_main("train", f"--model {name} {sizes} {scale_flags(scale)} --patch_size 24 --batch_size 2 --cpu "
                            f"--n_threads 0 --dir_data {tiny_data} --data_train tiny --data_test tiny --epochs 1 "
                            f"--test_every 2 --teacher {'+'.join(str(tmp_path / f'{other}.pth') for other in others)} "
                            f"--loss 1*DS+1*TS+10*SA+1*fitnet --ckp_dir {tmp_path / 'run'}")
    assert status == 0
    trained = load_model(tmp_path / "run" / "model" / "model_latest.pt")
    assert trained.config == small(name).config


@each_network
def test_its_checkpoint_is_tested_without_flags_for_sizes(run_main, tiny_data, tmp_path, name):
    scale = 4 if name in UPSCALING else 1
    torch.save(small(name, scale).state_dict(), tmp_path / "file.pth")
    status, out, _ = run_main("test", f"--ckp_path {tmp_path / 'file.pth'} --dir_data {tiny_data} --data_test tiny --cpu "
                              + scale_flags(scale))
    assert status == 0 and f"{name}, scale {scale}" in out[0] and out[-1].split()[0] == "tiny"


@pytest.mark.parametrize("name", ["CARN", "CARN_M"])
def test_a_checkpoint_of_several_scales_is_tested_and_is_a_teacher_at_the_given_scale(run_main, tiny_data, tmp_path, name):
    torch.save(small(name, multi_scale=(2, 3, 4)).state_dict(), tmp_path / "multi.pth")
    flags = f"--dir_data {tiny_data} --data_test tiny --cpu"
    status, _, err = run_main("test", f"--ckp_path {tmp_path / 'multi.pth'} {flags}")
    assert status == 2 and "x2, x3, x4: choose one with --scale" in err[0]
    assert run_main("test", f"--ckp_path {tmp_path / 'multi.pth'} {flags} --scale 3 --multi_scale 2+3+4")[0] == 0
    status, _, err = run_main("test", f"--ckp_path {tmp_path / 'multi.pth'} {flags} --scale 3 --multi_scale 2+3")
    assert status == 2 and "multi_scale" in err[0]
    status, _, _ = run_main("train", f"--model EDSR --n_resblocks 1 --n_feats 8 --scale 3 --patch_size 24 --batch_size 2 "
                            f"{flags} --data_train tiny --n_threads 0 --epochs 1 --test_every 1 --loss 1*TS "
                            f"--teacher {tmp_path / 'multi.pth'} --ckp_dir {tmp_path / 'run'}")
    assert status == 0


def test_the_error_for_an_unknown_layout_lists_networks_and_first_keys(run_main, tmp_path):
    torch.save({f"stage{k}.weight": torch.zeros(2) for k in range(6)}, tmp_path / "foreign.pth")
    status, _, err = run_main("test", f"--ckp_path {tmp_path / 'foreign.pth'} --data_test Sample")
    assert status == 2 and len(err) == 1
    assert all(word in err[0] for word in (*NETWORKS, "foreign.pth", "stage0.weight, stage1.weight"))


def test_a_gray_network_is_refused_where_images_are_rgb(run_main, tmp_path):
    torch.save(small("SwinIR", in_chans=1).state_dict(), tmp_path / "gray.pth")
    status, _, err = run_main("test", f"--ckp_path {tmp_path / 'gray.pth'} --data_test Sample")
    assert status == 2 and "gray" in err[0]


# ---- sizes that names and shapes do not determine

@pytest.mark.parametrize("name, flag, value", [("EDSR", "res_scale", 0.1), ("SwinIR", "img_range", 255)])
def test_a_size_that_no_shape_determines_can_be_given(tmp_path, name, flag, value):
    net = small(name)
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    save_model(net, tmp_path / "own.pt")
    for file in ("bare.pt", "own.pt"):
        assert load_model(tmp_path / file).config[flag] == 1
        assert load_model(tmp_path / file, **{flag: value}).config[flag] == value


def test_a_size_that_contradicts_the_checkpoint_is_refused(run_main, tmp_path):
    torch.save(small("SwinIR").state_dict(), tmp_path / "swinir.pth")
    for flag, value, held in (("depths", "2,2", "[2, 1]"), ("window_size", 8, 4), ("upsampler", "nearest+conv", "pixel")):
        status, _, err = run_main("test", f"--ckp_path {tmp_path / 'swinir.pth'} --data_test Sample --{flag} {value}")
        assert status == 2 and f"{flag} {held}" in err[0]


# ---- tiles

def test_tiles_of_swinir_are_aligned_with_windows_and_agree_with_the_whole_image():
    net = SwinIR(2, depths=(2, 2), n_feats=8, num_heads=(2, 2), window_size=8).eval()
    y, x = torch.meshgrid(torch.arange(90.0), torch.arange(107.0), indexing="ij")
    lr = torch.stack([y, x, 128 + 100 * (y / 7).sin() * (x / 9).cos()])[None]
    starts = []
    handle = net.register_forward_pre_hook(lambda _, inputs: starts.extend(inputs[0][:, :2, 0, 0].tolist()))
    tiled = inference.chop(net, lr, tile=20, tile_pad=21)
    handle.remove()
    assert len(starts) > 4 and all(start % 8 == 0 for pair in starts for start in pair)
    with torch.no_grad():
        assert (tiled - net(lr)).abs().max() < 0.05


# ---- safetensors

def test_safetensors_are_read_with_the_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, x = small("RCAN"), 255 * torch.rand(1, 3, 6, 6)
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "net.safetensors")(x), net(x))
    (tmp_path / "broken.safetensors").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="broken"):
        load_model(tmp_path / "broken.safetensors")


def test_safetensors_without_the_package_give_one_line(run_main, monkeypatch, tmp_path):
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "net.safetensors").write_bytes(b"")
    status, _, err = run_main("test", f"--ckp_path {tmp_path / 'net.safetensors'} --data_test Sample")
    assert status == 2 and len(err) == 1 and "pip install safetensors" in err[0]


# ---- the published scores

@pytest.mark.parametrize("file, scale, published", [
    ("IMDN_x2", 2, (37.996, 0.9605)), ("IMDN_x3", 3, (34.360, 0.9270)), ("IMDN_x4", 4, (32.210, 0.8948)),
    ("carn_m", 2, (37.678, 0.9595)), ("carn_m", 3, (34.058, 0.9248)), ("carn_m", 4, (31.883, 0.8910))])
def test_published_weights_reach_their_scores(run_main, shared, tmp_path, file, scale, published):
    which = f"--scale {scale}" if file == "carn_m" else ""
    status, out, _ = run_main("test", f"--ckp_path {shared / 'weights' / file}.pth {which} --data_test Set5 --cpu "
                              f"--dir_data {shared / 'data'} --dir_cache {tmp_path}")
    name, images, *scores = out[-1].split()[:4]
    assert status == 0 and (name, images) == ("Set5", "5")
    psnr, ssim = map(float, scores)
    assert abs(psnr - published[0]) < 0.005 and abs(ssim - published[1]) < 0.00011  # printed with 4 digits
