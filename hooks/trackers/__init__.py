"""The figures of the methods in the logs of transformers' Trainer, Lightning and accelerate, without an edit."""
