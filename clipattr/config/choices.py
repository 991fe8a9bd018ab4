"""Settings with a few allowed values: the names are the words in a YAML file."""

from enum import Enum


class Tokens(Enum):
    """Which tokens of the site are read."""

    cls = "cls"
    spatial = "spatial"
    all = "all"


class Stream(Enum):
    """Which stream of the tower is read; docs/sites.md explains each."""

    residual_before = "residual_before"
    heads = "heads"
    attention = "attention"
    residual_middle = "residual_middle"
    neurons = "neurons"
    mlp = "mlp"
    residual = "residual"
    embedding = "embedding"


class Architecture(Enum):
    """What makes the codes of a sparse autoencoder sparse."""

    topk = "topk"
    batch_topk = "batch_topk"
    relu = "relu"
    jump_relu = "jump_relu"
    gated = "gated"
    matryoshka = "matryoshka"
    nested_topk = "nested_topk"
    transcoder = "transcoder"


class Normalisation(Enum):
    """What is done to an activation before the encoder sees it; in `sae/normalisation.py`."""

    none = "none"
    centre = "centre"
    norm = "norm"
    layer_norm = "layer_norm"
    standardise = "standardise"
    scale = "scale"


class Bias(Enum):
    """What the decoder's bias starts from."""

    mean = "mean"
    geometric_median = "geometric_median"


class L0(Enum):
    """What stands for the number of active latents in the loss of a JumpReLU SAE."""

    step = "step"
    tanh = "tanh"


class LevelWeights(Enum):
    """What the levels of a nested TopK SAE count in the loss."""

    uniform = "uniform"
    reverse = "reverse"


class Decode(Enum):
    """How pictures become pixels."""

    exact = "exact"
    fast = "fast"
    draft = "draft"


class Mode(Enum):
    """How image shards are read in training."""

    indexed = "indexed"
    streaming = "streaming"


class CacheDtype(Enum):
    """How cached activations are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Logger(Enum):
    """Where the training curves go; tensorboard and wandb are extras."""

    csv = "csv"
    tensorboard = "tensorboard"
    wandb = "wandb"


class Precision(Enum):
    """Arithmetic of the training step; parameters stay float32."""

    fp32 = "fp32"
    bf16 = "bf16"


class WeightPrecision(Enum):
    """Weights of a frozen model; layer norms are computed in float32 where open_clip does so."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Method(Enum):
    """Attribution methods that a faithfulness table compares (logit_lens is always needed)."""

    attribution_patching = "attribution_patching"
    integrated_gradients = "integrated_gradients"
    act_times_logit_lens = "act_times_logit_lens"
    logit_lens = "logit_lens"
    energy = "energy"
    random = "random"
    exact = "exact"


class ExplainMethod(Enum):
    """Attribution methods that explain one image."""

    corrected_patching = "corrected_patching"
    attribution_patching = "attribution_patching"
    integrated_gradients = "integrated_gradients"
    two_point = "two_point"
    gradient_only = "gradient_only"
    exact_patching = "exact_patching"
    act_times_logit_lens = "act_times_logit_lens"
    logit_lens = "logit_lens"


class Explained(Enum):
    """The class that an image is explained for."""

    predicted = "predicted"
    label = "label"


class TokenPool(Enum):
    """What one activation of a latent in an image is made of those at its tokens."""

    max = "max"
    mean = "mean"
    sum = "sum"


class Init(Enum):
    """What a linear head starts from."""

    zero = "zero"
    text = "text"


class ClassWeight(Enum):
    """What the images of a class count in the loss."""

    none = "none"
    balanced = "balanced"


class Feature(Enum):
    """What a probe reads of an image."""

    embedding = "embedding"
    embedding_raw = "embedding_raw"
    site = "site"
    codes = "codes"


class HeadKind(Enum):
    """What a probe is."""

    linear = "linear"
    mlp = "mlp"
    attention = "attention"
    sparse = "sparse"


class Solver(Enum):
    """What fits it."""

    sgd = "sgd"
    lbfgs = "lbfgs"


class GroupMethod(Enum):
    """What the groups of images count in the fit."""

    erm = "erm"
    balanced = "balanced"
    group_dro = "group_dro"
    dfr = "dfr"
    jtt = "jtt"


class Criterion(Enum):
    """By which number one of several is chosen."""

    accuracy = "accuracy"
    balanced_accuracy = "balanced_accuracy"
    worst_group = "worst_group"


class OverlayKind(Enum):
    """What can be pasted into a picture."""

    sticker = "sticker"
    ruler = "ruler"
    ink = "ink"
    watermark = "watermark"
    frame = "frame"
    text = "text"


class RepairMethod(Enum):
    """What can be done about a cue; docs/probes.md explains each."""

    suppress = "suppress"
    project = "project"
    retrain = "retrain"
    dfr = "dfr"
    balanced = "balanced"
    group_dro = "group_dro"
