"""The live-model side of model-surgery, installed as `surgery.hooks`."""
