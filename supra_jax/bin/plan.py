"""Plans memory and FLOPs of a run, without weights: `python -m supra_jax.bin.plan --config=FILE.py --mesh=fsdp:8`."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from supra_jax.bin.entry import run
from supra_jax.bin.recipe_help import describe
from supra_jax.core.amounts import parse_bytes
from supra_jax.model.registry import mixer_names
from supra_jax.training.config import TrainConfig
from supra_jax.training.plan import CPU_NOTE, plan, planned_mesh, planned_model, planned_teacher, render

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe to plan, such as configs/FILE.py.", lock_config=True)
describe(_CONFIG, TrainConfig)
_MESH = flags.DEFINE_string(
  "mesh", "", "Mesh to plan for, such as fsdp:4,tensor:2; needs no such devices here. Default: that of the recipe."
)
_MODEL = flags.DEFINE_string(
  "model",
  "",
  "Preset for model and teacher, such as mistral_7b. Default: the checkpoint that the recipe names, or its preset.",
)
_MIXER = flags.DEFINE_enum("mixer", None, mixer_names(), "Mixer of a preset's layers. Default: supra.")
_DEVICE_MEMORY = flags.DEFINE_string(
  "device_memory", "", "Memory of a device, such as 80GB; the plan then says whether a step fits."
)
flags.mark_flag_as_required("config")


def main() -> None:
  config = TrainConfig.from_mapping(_CONFIG.value.to_dict())
  text = _MESH.value or config.mesh
  if not text:
    raise ValueError("Neither --mesh nor the recipe says what to plan for: wanted --mesh=fsdp:8, say.")
  device_memory = parse_bytes(_DEVICE_MEMORY.value, _DEVICE_MEMORY.name) if _DEVICE_MEMORY.value else None
  mesh = planned_mesh(text)
  model = planned_model(config, _MODEL.value, _MIXER.value)
  teacher = planned_teacher(config, _MODEL.value)
  made = plan(config, model, mesh, teacher)
  print(render(made, device_memory))
  if mesh.devices.flat[0].platform == "cpu":
    print(f"\n{CPU_NOTE}")


if __name__ == "__main__":
  run(main)
