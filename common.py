"""Shared by the lab's three scripts: the small CNN, its training and evaluation, checkpoints.

What surrounds it stands in modules of its own, offered here too: ``common_options`` (command line, recipe),
``common_data`` (data sets), ``common_optim`` (optimizers), ``common_parallel`` (worker processes) and ``common_run``
(devices, result files, figures). Importing does nothing but define names; libraries that only some steps need are
imported by those steps.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common_data import (
    Dataset,
    load_dataset,
    load_dataset_or_fallback,
    make_dataset,
    open_shared,
    shared_dataset,
    split_validation,
    subset,
)
from common_optim import make_optimizer, optimizer_class, schedule_factor
from common_options import (
    PRESETS,
    ROOT,
    Recipe,
    UserError,
    add_common_args,
    first_line,
    natural_int,
    positive_int,
    run_script,
)
from common_parallel import Parallel, end_with_parent, interrupts_held, run_parallel, worker_context, worker_pool
from common_run import (
    PALETTE,
    Runtime,
    atomic_path,
    environment,
    figure,
    finish,
    interval,
    make_runtime,
    matrix_product_speed,
    output_directory,
    plain_numbers,
    save_tensors,
    table,
    write_csv,
    write_json,
    write_text,
)

# ---------------------------------------------------------------- 1. network


LOGIT_SCALE = 1 / 9  # keeps the first logits and the head's first steps small (Jordan 2024)


class SmallCNN(nn.Module):
    """A small VGG-like network; input float32 (N, C, H, W) in [0, 1], output logits (N, num_classes).

    A fixed stem whitens patches (after Page's and Jordan's CIFAR-10 speed runs; never trained, it needs no
    backward pass): 2x2 pixels at every position, or with ``stem_stride`` 2 4x4 pixels at every other one, which
    leaves a quarter of the positions: faster by far, but less accurate in the end. Then stages of two 3x3
    convolutions, ``growth`` times ``width`` channels each, and global max-pooling, so that 28x28 and 32x32
    pictures both fit. Pooling *before* BatchNorm and ReLU leaves those a quarter of the pixels.
    BatchNorm learns a shift but no scale: with a positive scale it commutes with max-pooling, so that ``fuse``
    can fold it into the convolution. The normalisation constants are buffers: an exported file cannot disagree
    with training.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int = 32,
        dropout: float = 0.0,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        stem_stride: int = 1,
        growth: Sequence[int] = (1, 4, 4),
    ) -> None:
        super().__init__()
        if width < 16 or width % 16:
            raise UserError(f"width {width} is no multiple of 16")
        shape = {"in_channels": in_channels, "num_classes": num_classes, "width": width, "stem_stride": stem_stride}
        self.config = shape | {"growth": tuple(growth), "dropout": dropout}
        self.register_buffer("mean", torch.tensor(mean).expand(in_channels).reshape(1, -1, 1, 1).clone())
        self.register_buffer("std", torch.tensor(std).expand(in_channels).reshape(1, -1, 1, 1).clone())
        channels = 8 * stem_stride * in_channels  # the strongest directions, with both signs
        self.stem = nn.Conv2d(in_channels, channels, 2 * stem_stride, stem_stride, bias=False).requires_grad_(False)
        layers: list[nn.Module] = [nn.ReLU()]
        for stage_width in (width * factor for factor in growth):
            for pool in ([nn.MaxPool2d(2)], []):
                convolution = nn.Conv2d(channels, stage_width, 3, padding=1, bias=False)
                nn.init.dirac_(convolution.weight[: min(channels, stage_width)].data)
                norm = nn.BatchNorm2d(stage_width, momentum=0.4)  # a short training has few steps to average over
                norm.weight.requires_grad_(False)
                layers += [convolution, *pool, norm, nn.ReLU()]
                channels = stage_width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        features = self.features(self.stem((images - self.mean) / self.std))
        return LOGIT_SCALE * self.head(self.dropout(features.amax((2, 3))))

    @torch.no_grad()
    def whiten_stem(self, images: Tensor) -> None:
        """Set the stem to the first principal directions of its patches, scaled to unit variance.

        ``images`` are uint8 (N, C, H, W) training pictures. Each direction is used with both signs,
        because the ReLU that follows keeps one half of each.
        """
        pixels = (images.float().div(255).to(self.mean.device) - self.mean) / self.std
        patches = F.unfold(pixels, self.stem.kernel_size, stride=self.stem.stride)
        patches = patches.transpose(1, 2).flatten(0, 1).double()
        variance, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
        filters = (directions / (variance.clamp_min(0) + 5e-4).sqrt()).T.flip(0)[: self.stem.out_channels // 2]
        self.stem.weight.copy_(torch.cat([filters, -filters]).view_as(self.stem.weight))


def make_model(dataset: Dataset, recipe: Recipe, seed: int = 0) -> SmallCNN:
    """The SmallCNN of ``recipe`` for ``dataset``, its initial weights a function of ``seed`` alone; channels_last."""
    channels, classes, scale = dataset.train_images.shape[1], len(dataset.classes), (dataset.mean, dataset.std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(channels, classes, recipe.width, recipe.dropout, *scale, recipe.stem_stride, recipe.growth)
    model.whiten_stem(dataset.train_images[:: max(1, len(dataset.train_images) // 2000)])
    return model.to(memory_format=torch.channels_last)


def fuse(model: SmallCNN) -> nn.Sequential:
    """An eval-mode copy of ``model`` with every BatchNorm and the normalisation folded into convolutions.

    Exact up to rounding, because every BatchNorm scale is positive (asserted). This is the network to
    deploy: convolution, ReLU, pooling and nothing else.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    source = copy.deepcopy(model).eval()
    stem = source.stem
    stem.weight.data /= source.std
    stem.bias = nn.Parameter(-(stem.weight.detach() * source.mean).sum((1, 2, 3)))
    layers: list[Any] = [stem]
    pools: list[nn.Module] = []
    for layer in source.features:
        if isinstance(layer, nn.MaxPool2d):
            pools = [layer]
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight > 0).all()
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers += [layer, *pools] if isinstance(layer, nn.ReLU) else [layer]
            pools = [] if isinstance(layer, nn.ReLU) else pools
    source.head.weight.data *= LOGIT_SCALE
    source.head.bias.data *= LOGIT_SCALE
    fused = nn.Sequential(*layers, GlobalMaxPool(), source.head).requires_grad_(False)
    return fused.to(memory_format=torch.channels_last).eval()


class GlobalMaxPool(nn.Module):
    """(N, C, H, W) -> (N, C), the maximum over all positions."""

    def forward(self, features: Tensor) -> Tensor:
        """The maxima (N, C)."""
        return features.amax((2, 3))


# ---------------------------------------------------------------- 2. training


def draw_batch(
    images: Tensor, index: Tensor, padding: int, generator: torch.Generator, flip: Tensor | None = None
) -> Tensor:
    """Gather pictures ``index`` (B,), each flipped and shifted by chance: uint8 (B, C, H, W).

    ``images`` is channels_last; every picture gets a shift of its own of at most ``padding`` pixels in
    each direction (borders mirrored) and, where ``flip`` (B,) bool is given, is mirrored there. One
    gather of whole pixels (of whole pictures, where there is nothing to do) does it all. Random numbers
    come from the CPU's ``generator``, so the batch is the same on every device.
    """
    count, (channels, height, width) = len(index), images.shape[1:]
    stored = images.permute(0, 2, 3, 1)  # a view: images are stored as NHWC
    if not padding and flip is None:  # whole pictures
        return stored.index_select(0, index.to(images.device)).permute(0, 3, 1, 2)
    shift = (
        torch.randint(-padding, padding + 1, (2, count, 1), generator=generator)
        if padding
        else torch.zeros(2, count, 1, dtype=torch.long)
    )
    rows = mirror(torch.arange(height) + shift[0], height)
    columns = torch.arange(width).expand(count, width)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = mirror(columns + shift[1], width)
    pixel = (index[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    batch = stored.reshape(-1, channels).index_select(0, pixel.flatten().to(images.device, non_blocking=True))
    return batch.view(count, height, width, channels).permute(0, 3, 1, 2)


def mirror(position: Tensor, size: int) -> Tensor:
    """Reflect positions outside [0, size) at the borders, without repeating the border pixel."""
    return size - 1 - (size - 1 - position.abs()).abs()


def fit(
    model: SmallCNN,
    dataset: Dataset,
    recipe: Recipe,
    runtime: Runtime,
    *,
    train_index: Tensor,
    validation_index: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[list[dict[str, Any]], list[float]]:
    """Train ``model`` in place on ``train_index``'s pictures; returns (history, loss of every step).

    One history row per epoch: epoch, train_loss (mean over the epoch's steps, as trained on: with
    augmentation and label smoothing), val_loss and val_accuracy (where ``validation_index`` is given),
    seconds (of training, summed from the start, without validation). ``labels`` (N,) replaces the training
    labels, to train on noisy ones. ``on_epoch`` sees every row as it comes and may raise, to stop
    early. A loss that is not finite ends the training; the last row then says so by its nan.
    """
    device = torch.device(runtime.device)
    model.to(device).train()
    images = dataset.train_images.to(device)
    targets = (dataset.train_labels if labels is None else labels).to(device)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    first_flip = torch.rand(len(train_index), generator=generator) < 0.5
    batch_size = min(recipe.batch_size, len(train_index))
    steps = len(train_index) // batch_size  # of an epoch; the rest waits for the next shuffle
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    seconds = 0.0
    for epoch in range(recipe.epochs):
        start = time.perf_counter()
        order = torch.randperm(len(train_index), generator=generator)
        epoch_losses = []
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            index = train_index[chosen]
            # A picture mirrored in one epoch is not in the next (alternating flip, Jordan 2024).
            flip = first_flip[chosen] ^ bool(epoch % 2) if recipe.crop_padding else None
            batch = draw_batch(images, index, recipe.crop_padding, generator, flip).float().div_(255)
            factor = schedule_factor(recipe.schedule, (epoch * steps + step) / (recipe.epochs * steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), targets[index.to(device)], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            epoch_losses.append(loss.detach())
        losses += torch.stack(epoch_losses).tolist()  # the epoch's only wait for the device
        seconds += time.perf_counter() - start
        row = {"epoch": epoch + 1, "train_loss": float(np.mean(losses[-steps:])), "seconds": seconds}
        if validation_index is not None:
            row["val_loss"], row["val_accuracy"] = evaluate(
                model, dataset.train_images, dataset.train_labels, runtime, validation_index
            )
            model.train()
        history.append(row)
        if on_epoch is not None:
            on_epoch(row)
        if not np.isfinite(row["train_loss"]):
            break
    return history, losses


# ---------------------------------------------------------------- 3. evaluation


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, runtime: Runtime, index: Tensor | None = None, views: int = 1) -> Tensor:
    """Logits float32 (N, num_classes) on the CPU, of uint8 pictures (N, C, H, W) or those at ``index``.

    With 2 ``views`` the mean over a picture and its mirror image; with 6 also over both of them shifted by one pixel,
    up left and down right, borders mirrored (test-time augmentation as in Jordan 2024, here with equal weights).
    """
    device = torch.device(runtime.device)
    model.to(device).eval()
    positions = torch.arange(len(images)) if index is None else index
    outputs = []
    for chunk in positions.split(500):
        batch = images[chunk].to(device).float().div_(255)
        with torch.autocast(device.type, torch.bfloat16, enabled=runtime.precision == "bf16"):
            logits = torch.stack([model(view).float() for view in views_of(batch, views)]).mean(0)
        outputs.append(logits)
    return torch.cat(outputs).cpu()


def views_of(batch: Tensor, count: int) -> list[Tensor]:
    """The first ``count`` of 6 views of pictures (N, C, H, W); see ``predict``."""
    height, width = batch.shape[2:]
    views = [batch, batch.flip(3)]
    if count > 2:
        padded = F.pad(batch, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[:, :, 2:, 2:], padded[:, :, :height, :width]]
        views += [view for crop in shifted for view in (crop, crop.flip(3))]
    return views[:count]


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime, index: Tensor | None = None
) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in [0, 1]) of ``model``; leaves it in eval mode."""
    logits = predict(model, images, runtime, index)
    target = labels if index is None else labels[index]
    return float(F.cross_entropy(logits, target)), float((logits.argmax(1) == target).float().mean())


def per_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Accuracy in [0, 1] per class, of predicted and true labels (N,); nan for a class without pictures."""
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    return (right / torch.bincount(labels, minlength=num_classes)).tolist()


# ---------------------------------------------------------------- 4. checkpoints


def save_checkpoint(path: Path, model: SmallCNN, dataset: Dataset, recipe: Recipe, **facts: Any) -> None:
    """Save weights and all that is needed to rebuild and judge the model (``facts``: seed, accuracy)."""
    content = {
        "format": "SmallCNN-1",
        "model": model.config,
        "state": {key: value.cpu() for key, value in model.state_dict().items()},
        "classes": list(dataset.classes),
        "dataset": dataset.name,
        "source": dataset.source,
        "recipe": asdict(recipe),
        **facts,
    }
    save_tensors(path, content)


def load_checkpoint(path: Path) -> tuple[SmallCNN, dict[str, Any]]:
    """(model in eval mode, everything else saved with it); raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        if content["format"] != "SmallCNN-1":
            raise ValueError(f"format {content['format']!r}")
        model = SmallCNN(**content["model"])
        model.load_state_dict(content.pop("state"))
        missing = {"classes", "dataset", "source"} - set(content)
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except Exception as error:  # torch.load raises almost anything for a foreign file
        foreign = isinstance(error, pickle.UnpicklingError | EOFError)  # torch's own text is long and about code
        reason = "not saved by it" if foreign else " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path} is no checkpoint of this lab's SmallCNN, or damaged: {reason}") from None
    return model.to(memory_format=torch.channels_last).eval(), content
