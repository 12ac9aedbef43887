"""DeepSpeed on two processes without a GPU: gloo's collectives, for its own are compiled first, and all in float64."""

import os
import sys

import torch

STAGE3 = {"param_persistence_threshold": 0, "gather_16bit_weights_on_model_save": True}
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
}


def start():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    def double(self, **settings):
        configure(self, **settings)
        return torch.float64

    configure, ZeROOptimizer._configure_master_weights = ZeROOptimizer._configure_master_weights, double
    deepspeed.DeepSpeedEngine.communication_data_type = torch.float64
    deepspeed.DeepSpeedEngine.get_data_types = lambda _: (torch.float64, torch.float64)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.utils.logger.setLevel("ERROR")


def config(stage, **others):
    """Return a configuration in which no weight is too small to be split."""
    stage3 = {f"stage3_{name}": value for name, value in STAGE3.items()} if stage == 3 else {}
    return CONFIG | {"zero_optimization": {"stage": stage, "reduce_scatter": False, **stage3}} | others
