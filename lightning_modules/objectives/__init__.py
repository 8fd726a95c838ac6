"""Objectives: how each agent learns from a rollout, swapped by class path (`model.objective`)."""

from lightning_modules.objectives.base import FlowBatch, FlowObjective, ObjectiveResult
from lightning_modules.objectives.flow_grpo import FlowGRPO, RatioNormalization
from lightning_modules.objectives.forward import ForwardObjective
from lightning_modules.objectives.matching import AWM, DiffusionNFT, RewardWeighted
from lightning_modules.objectives.preference import DGPO, DPO
from lightning_modules.objectives.refiner import RefinerGRPO

__all__ = [
    "AWM",
    "DGPO",
    "DPO",
    "DiffusionNFT",
    "FlowBatch",
    "FlowGRPO",
    "FlowObjective",
    "ForwardObjective",
    "ObjectiveResult",
    "RatioNormalization",
    "RefinerGRPO",
    "RewardWeighted",
]
