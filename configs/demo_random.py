"""The demo's run from the paper's start: configs/demo.py, with the learning rate that was best for random phi."""

import ml_collections

from configs import demo


def get_config() -> ml_collections.ConfigDict:
  config = demo.get_config()
  config.optimizer.learning_rate = 2e-3
  return config
