"""The process that `test_kill` kills; apart from it, for another process cannot import a test module by its name."""

import logging
import os

import torch

from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain


def train(settings, path):
    os.setpgrp()
    torch.set_num_threads(1)
    logging.basicConfig(filename=path.with_suffix(".log"), force=True)
    pretrain(build_recipe(settings, PretrainRecipe), path)
