"""What it costs to cut a tower and to read it, beside the peers.

    python benchmarks/towers.py
    python benchmarks/towers.py --device cuda --batch 256

Same random weights and inputs, equal outputs (asserted), no gradient except where it is timed.
Every round runs all rivals of a section once, in a new order; a ratio is the median over the rounds
of rival / first line of the section, with its quartiles. Ratios are the result, milliseconds the
scale. Bars: a suffix behind L of N blocks costs (N - L) / N of a forward pass + 5 %; reading the
residual stream behind every block 5 % more than a forward pass, and than the fastest peer.
vit-prisma is timed where it is installed: 2.0, on GitHub alone; 0.1 of PyPI knows no open_clip.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from clipattr.clip import Site, Tower, image_tower, text_tower

Read = tuple[Tensor, list[Tensor]]  # the embedding, and what was read in every block
Rivals = dict[str, Callable[[], Any] | None]  # None: not installed
Times = dict[str, list[float]]  # seconds of every rival in every round

AS_TOKENS: Any = {"output_fmt": "NLC", "output_extra_tokens": True}
PRISMA = ("configs.HookedViTConfig", "models.base_vit", "models.weight_conversion")
PROMPTS = [f"a photo of a {name}." for name in open_clip.IMAGENET_CLASSNAMES[:256]]


def compare(title: str, rivals: Rivals, rounds: int, bars: dict[str, float]) -> Times:
    """One line for every rival, next to the first one."""
    order, runs = random.Random(0), {name: run for name, run in rivals.items() if run is not None}
    times: Times = {name: [] for name in runs}
    for run in runs.values():
        seconds(run)  # warm-up
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name]))
    print(f"\n{title:<48}{'ms':>9}{'ratio':>8}{'quartiles':>14}{'bar':>7}")
    first = next(iter(times.values()))
    for name in rivals:
        if name in times:
            show(name, times[name], first, bars.get(name))
        else:
            print(f"{name:<48}{'not installed':>17}")
    return times


def show(name: str, times: list[float], base: list[float], bar: float | None) -> None:
    """One line of the table."""
    milliseconds = 1000 * statistics.median(times)
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    verdict = "" if bar is None else f"{bar:7.2f} {'within' if ratio <= bar else 'ABOVE'}"
    print(f"{name:<48}{milliseconds:9.1f}{ratio:8.3f}{f'{low:.3f}-{high:.3f}':>14}{verdict}")


def seconds(run: Callable[[], Any]) -> float:
    """Of one run, until the device has finished."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def check_same(found: Any, expected: Any) -> None:
    """Who computes something else is no rival."""
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


def time_suffixes(tower: Tower, visual: Any, images: Tensor, rounds: int) -> None:
    """Suffixes behind a quarter, half, three quarters and all of the blocks."""
    n = tower.n_layers
    forward: Rivals = {"whole forward": partial(visual, images)}
    backward: Rivals = {"whole, gradient of the images": partial(gradient, visual, images)}
    bars: dict[str, float] = {}
    for done in (n // 4, n // 2, 3 * n // 4, n):
        for tokens in ("all", "cls"):
            cut = tower.cut(Site(done - 1, "residual", tokens))
            x, rest = cut.prefix(images)
            check_same(cut.suffix(x, rest), visual(images))
            name = f"suffix behind block {done} of {n}, {tokens}"
            bars[name] = (n - done) / n + 0.05
            forward[name] = partial(cut.suffix, x, rest)
            backward[name] = partial(gradient, partial(cut.suffix, rest=rest), x)
    compare("suffix, forward", forward, rounds, bars)
    with torch.enable_grad():
        compare("suffix, forward and backward", backward, rounds, {})


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of the summed embeddings, with respect to x."""
    x = x.detach().requires_grad_(True)
    return torch.autograd.grad(function(x).sum(), x)[0]


def time_residuals(tower: Tower, visual: Any, images: Tensor, hooked: Any, rounds: int) -> None:
    """The residual stream behind every block and the embedding, in one pass."""
    rivals: Rivals = {
        "whole forward": lambda: visual(images),
        "clipattr, all": lambda: capture(tower, images, "residual", "all"),
        "raw hooks, all": lambda: read_hooks(visual, images, "all"),
        "open_clip intermediates, all": lambda: visual.forward_intermediates(images, **AS_TOKENS),
        "vit-prisma, all": reader(hooked, images, "hook_resid_post"),
        "clipattr, cls": lambda: capture(tower, images, "residual", "cls"),
        "raw hooks, cls": lambda: read_hooks(visual, images, "cls"),
    }
    expected = capture(tower, images, "residual", "all")
    check_same(expected, read_hooks(visual, images, "all"))
    patches = visual.forward_intermediates(images, **AS_TOKENS)["image_intermediates"]
    check_same(patches, [x[:, 1:] for x in expected[1]])
    if (read := rivals["vit-prisma, all"]) is not None:
        check_same(read(), expected)
    check_same(capture(tower, images, "residual", "cls"), read_hooks(visual, images, "cls"))
    bars = {"clipattr, all": 1.05, "clipattr, cls": 1.05}
    times = compare("residual stream behind all blocks", rivals, rounds, bars)
    for tokens in ("all", "cls"):
        mine, *peers = [name for name in times if name.endswith(f", {tokens}")]
        fastest = min(peers, key=lambda name: statistics.median(times[name]))
        show(f"{mine} / {fastest}", times[mine], times[fastest], 1.05)


def capture(tower: Tower, images: Tensor, stream: str, tokens: str) -> Read:
    """Ours: one stream of every block."""
    sites = [Site(layer, stream, tokens) for layer in range(tower.n_layers)]
    *found, embedding = tower.capture(images, [*sites, Site(-1, "embedding")]).values()
    return embedding, found


def read_hooks(visual: Any, images: Tensor, tokens: str) -> Read:
    """What most people write: forward hooks on the blocks."""
    found: list[Tensor] = []

    def keep(_module: object, _inputs: object, x: Tensor) -> None:
        found.append(x if tokens == "all" else x[:, 0].clone())

    with ExitStack() as hooks:
        for block in visual.transformer.resblocks:
            hooks.enter_context(block.register_forward_hook(keep))
        return visual(images), found


def time_heads(tower: Tower, visual: Any, images: Tensor, hooked: Any, rounds: int) -> None:
    """Outputs of all heads, and attention weights, of all blocks."""
    outputs = partial(capture, tower, images, "heads", "all")

    def weights() -> Read:
        embedding, befores = capture(tower, images, "residual_before", "all")
        return embedding, [tower.attention_weights(i, x) for i, x in enumerate(befores)]

    rivals: Rivals = {
        "whole forward": lambda: visual(images),
        "clipattr, outputs of heads": outputs,
        "vit-prisma, outputs of heads": reader(hooked, images, "hook_z"),
        "clipattr, attention weights": weights,
        "vit-prisma, attention weights": reader(hooked, images, "hook_pattern"),
    }
    for hook, ours in (("hook_z", outputs), ("hook_pattern", weights)):
        if (read := reader(hooked, images, hook)) is not None:
            check_same(read(), ours())
    compare("heads of all blocks", rivals, rounds, {})


def prisma_vit(model: Any, visual: Any) -> Any:
    """vit-prisma's HookedViT with the same weights, without the hub; None if not installed."""
    try:
        configs, models, conversion = (import_module(f"vit_prisma.{name}") for name in PRISMA)
    except ImportError:
        return None
    block = visual.transformer.resblocks[0]
    config = configs.HookedViTConfig(
        n_layers=len(visual.transformer.resblocks),
        d_model=visual.transformer.width,
        d_mlp=block.mlp.c_fc.out_features,
        n_heads=block.attn.num_heads,
        d_head=block.attn.head_dim,
        activation_name="gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
        eps=block.ln_1.eps,
        layer_norm_pre=True,
        patch_size=visual.conv1.kernel_size[0],
        image_size=visual.image_size[0],
        n_classes=visual.output_dim,
        return_type="class_logits",
    )
    hooked = models.HookedViT(config)
    hooked.load_state_dict(conversion.convert_open_clip_weights(model.state_dict(), config))
    return hooked.requires_grad_(False).eval().to(visual.proj.device)


def reader(hooked: Any, images: Tensor, hook: str) -> Callable[[], Read] | None:
    """Reads one hook point of every block of a HookedViT."""

    def read() -> Read:
        embedding, cache = hooked.run_with_cache(
            images, names_filter=lambda name: name.endswith(hook), return_cache_object=False
        )
        return embedding, [x.flatten(2) if hook == "hook_z" else x for x in cache.values()]

    return None if hooked is None else read


def time_text(model: Any, tokens: Tensor, rounds: int) -> None:
    """Short prompts: the tower reads no further than the longest one."""
    encode, embed = partial(model.encode_text, tokens), partial(text_tower(model).embed, tokens)
    check_same(embed(), encode())
    length = int(tokens.argmax(dim=1).max()) + 1
    rivals: Rivals = {"encode_text": encode, "clipattr, embed": embed}
    compare(f"{len(tokens)} prompts, {length} of {tokens.shape[1]} tokens", rivals, rounds, {})


def main() -> None:
    """Print one table for all sections."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip ViT that pools its CLS")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="a third of them for the prompts")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model: Any = open_clip.create_model(options.model, load_weights=False, device=options.device)
    assert isinstance(model.visual, VisionTransformer), "the peers read open_clip's own ViT alone"
    model.eval().requires_grad_(False)
    tower, visual, hooked = image_tower(model), model.visual, prisma_vit(model, model.visual)
    images = torch.randn(options.batch, 3, *visual.image_size, device=options.device)
    tokens = open_clip.get_tokenizer(options.model)(PROMPTS).to(options.device)
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, {vars(options)}")
    with torch.no_grad():
        time_residuals(tower, visual, images, hooked, options.rounds)
        time_suffixes(tower, visual, images, options.rounds)
        time_heads(tower, visual, images, hooked, options.rounds)
        time_text(model, tokens, max(2, options.rounds // 3))


if __name__ == "__main__":
    main()
