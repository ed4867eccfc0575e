"""VGG-19 features of images (Simonyan and Zisserman, ICLR 2015), trained on ImageNet, in torchvision's layout."""
from types import SimpleNamespace

import torch
from torch import nn

from loss.frozen import frozen, new_network, randomise, require_file
from loss.term import Context
from model.loading import load_strictly, read_checkpoint
from system.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
WIDTHS = 64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 512, 512, "pool", 512
FEATURE_LAYERS = 1, 6, 11, 20, 29  # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1
IGNORED = "features.30.", "features.32.", "features.34.", "classifier."  # layers after relu5_1
MIN_SIDE = 16  # pixels; four poolings reduce them to one


class VGG19(nn.Module):
    """Compute the feature maps relu1_1 to relu5_1 of images N x 3 x H x W in [0, rgb_range].

    They have 64, 128, 256, 512, 512 channels and 1, 1/2, ... 1/16 of the size.
    """

    title = "VGG-19"

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for width in WIDTHS:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)
        self.rgb_range = 255
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Normalise images as in training and return their five feature maps."""
        x = images.float() / self.rgb_range
        x = ((x - self.mean) / self.std).to(self.features[0].weight.dtype)
        feature_maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in FEATURE_LAYERS:
                feature_maps.append(x.float())
        return feature_maps


def make_vgg(args: SimpleNamespace) -> VGG19:
    """Load the VGG-19 of --vgg_path, or build an untrained one; raises UserError."""
    if args.patch_size < MIN_SIDE:
        raise UserError(f"--patch_size {args.patch_size}: VGG-19 needs images of {MIN_SIDE} pixels and more")
    net = new_network(VGG19)
    if args.feature_net == "random":
        randomise(net)
    else:
        require_file(args.vgg_path, "vgg19", "--vgg_path")
        load_strictly(net, read_checkpoint(args.vgg_path)[1], f"{args.vgg_path}: not a {net.title}: ", IGNORED)
    net.rgb_range = args.rgb_range
    return net


def shared_vgg(context: Context) -> VGG19:
    """Return the VGG-19 that all terms of a run share; raises UserError."""
    return frozen(context, "vgg", make_vgg)


@torch.no_grad()
def without_graph(net: nn.Module, *images: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Compute the feature maps of several batches as one batch, without gradients; returns those of each batch."""
    feature_maps = net(torch.cat([x.float() for x in images]))
    return list(zip(*(x.split([len(batch) for batch in images]) for x in feature_maps)))
