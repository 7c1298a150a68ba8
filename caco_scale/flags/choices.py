"""The words that a field may have, each list stated once: for the configuration's types and for the mathematics alike.

``get_args`` of a type gives its words in order. This file knows nothing of anything else.
"""

from typing import Literal, get_args

BankRule = Literal["caco", "adco", "moco", "nearest", "nnclr", "inbatch"]
Predictor = Literal["auto", "mlp", "none"]
BankExchange = Literal["statistics", "logits"]
BankKernel = Literal["torch", "triton"]
KernelInputs = Literal["fp32", "tf32", "bf16"]
AutoSwitch = Literal["auto", "true", "false"]
Stats = Literal["given", "measure"]
Finish = Literal["all", "export", "report", "none"]
Stem = Literal["imagenet", "cifar"]
Optimizer = Literal["lars", "sgd", "adamw"]
Compute = Literal["auto", "bf16", "fp32", "fp64"]
Encoder = Literal["query", "key"]
MapMethod = Literal["auto", "pca", "tsne", "umap"]
ExportFormat = Literal["safetensors", "torchvision", "timm", "huggingface"]
StrategyName = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]

BANK_RULES: tuple[str, ...] = get_args(BankRule)
# What the rules have in common: their positive is the nearest row, their rows learn, or are a queue of keys, and their
# negatives are the batch.
NEAREST_RULES = ("caco", "nearest", "nnclr")
LEARNING_RULES = ("caco", "adco")
QUEUE_RULES = ("moco", "nearest", "nnclr")
BATCH_RULES = ("nnclr", "inbatch")
BANK_EXCHANGES: tuple[str, ...] = get_args(BankExchange)
BANK_KERNELS: tuple[str, ...] = get_args(BankKernel)
KERNEL_INPUTS: tuple[str, ...] = get_args(KernelInputs)
STEMS: tuple[str, ...] = get_args(Stem)
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
ENCODERS: tuple[str, ...] = get_args(Encoder)
EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)
STRATEGIES: tuple[str, ...] = get_args(StrategyName)
