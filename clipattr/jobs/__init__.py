"""One file per job; `run` is the only place that knows them all."""

from clipattr.config.schema import (
    Atlas,
    CacheActivations,
    EvaluateAttribution,
    EvaluateSae,
    EvaluateWorld,
    EvaluateWorldZeroshot,
    EvaluateZeroshot,
    Explain,
    Find,
    Finetune,
    JobConfig,
    Predict,
    RenderWorld,
    Shortcuts,
    TrainClip,
    TrainProbe,
    TrainSae,
)


def run(config: JobConfig, command: list[str]) -> None:
    """Run the job of a validated config. Each job imports what it needs, and no more."""
    match config:
        case RenderWorld():
            from clipattr.jobs.render_world import render_world

            render_world(config, command)
        case TrainClip():
            from clipattr.jobs.train_clip import train_clip

            train_clip(config, command)
        case CacheActivations():
            from clipattr.jobs.cache_activations import cache_activations

            cache_activations(config, command)
        case TrainSae():
            from clipattr.jobs.train_sae import train_sae

            train_sae(config, command)
        case TrainProbe():
            from clipattr.jobs.train_probe import train_probe

            train_probe(config, command)
        case Finetune():
            from clipattr.jobs.finetune import finetune

            finetune(config, command)
        case _:
            _evaluate(config, command)


def _evaluate(config: JobConfig, command: list[str]) -> None:
    match config:
        case EvaluateZeroshot():
            from clipattr.jobs.evaluate_zeroshot import evaluate_zeroshot

            evaluate_zeroshot(config, command)
        case EvaluateSae():
            from clipattr.jobs.evaluate_sae import evaluate_sae

            evaluate_sae(config, command)
        case EvaluateWorldZeroshot():
            from clipattr.jobs.evaluate_world_zeroshot import evaluate_world_zeroshot

            evaluate_world_zeroshot(config, command)
        case EvaluateWorld():
            from clipattr.jobs.evaluate_world import evaluate_world

            evaluate_world(config, command)
        case EvaluateAttribution():
            from clipattr.jobs.evaluate_attribution import evaluate_attribution

            evaluate_attribution(config, command)
        case _:
            _answer(config, command)


def _answer(config: JobConfig, command: list[str]) -> None:
    """Jobs that answer a question of a person."""
    match config:
        case Explain():
            from clipattr.jobs.explain import explain

            explain(config, command)
        case Atlas():
            from clipattr.jobs.atlas import atlas

            atlas(config, command)
        case Find():
            from clipattr.jobs.find import find

            find(config, command)
        case Shortcuts():
            from clipattr.jobs.shortcuts import shortcuts

            shortcuts(config, command)
        case Predict():
            from clipattr.jobs.predict import predict

            predict(config, command)
        case _:
            raise AssertionError(f"no job for {type(config).__name__}")
