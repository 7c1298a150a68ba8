"""What an unknown flag may have meant: by a table of what people type, out of other programs' habits.

The nearest letters alone mislead: ``--data`` is near to ``--data.mix`` and means ``--data.shards``. So a name is looked
up first: in the table, and as the last part of a flag. Letters decide only where a name is misspelt, by one or two.

This file knows neither commands nor recipes: of a target in the table it offers what the command at hand has.
"""

from collections.abc import Collection, Iterable, Mapping

from caco_scale.shipped import spelled

ZERO2 = "ds_configs/zero2.yaml"

# Flag, or flags of which a command has the first one that it has -> what people type for it. The first line with a word
# and a flag of the command counts.
MEANT = {
    "optim.lr | lr": "lr learning_rate lr_rate base_lr init_lr base_learning_rate peak_lr blr",
    "optim.epochs | epochs": "epochs epoch num_epochs max_epochs n_epochs total_epochs train_epochs",
    "optim.name": "optimizer optim opt optim_name solver",
    "optim.weight_decay": "wd decay l2 weight_decay_rate",
    "optim.warmup_epochs": "warmup warmup_epoch lr_warmup warm_up num_warmup_epochs",
    "run.max_steps": "steps num_steps n_steps max_iter max_iters iterations total_steps train_steps",
    "run.seed | seed": "seed random_seed rng_seed manual_seed",
    "run.log_every": "print_freq log_interval log_freq log_step log_every_n_steps logging_steps print_every",
    "run.save_every": "save_freq saveckp_freq save_interval ckpt_freq checkpoint_every save_steps saving_steps",
    "run.keep_checkpoints": "save_total_limit save_top_k keep max_keep",
    "to | csv | run.dir | dir": "output out output_dir out_dir save_dir save save_path logdir log_dir work_dir workdir "
    "outdir exp_dir experiment experiment_dir result_dir results default_root_dir o",
    "run.dir | dir": "run_dir rundir run_directory",
    "run.resume": "resume_from auto_resume resume_from_checkpoint ckpt_path load_from",
    "run.trackers": "tracker wandb logger loggers report_to use_wandb mlflow tensorboard",
    "data.shards | data | images": "data dataset data_path data_dir datadir data_root train_data train_dir traindir "
    "data_set train train_path training_data images image_dir images_dir img_dir root input input_dir folder path "
    "source src dataset_path dataset_dir shards",
    "data.val_shards | val": "val val_data data_val valdir val_dir val_path validation eval_data test test_data "
    "test_dir valid val_shards validation_data val_dataset",
    "data.global_batch_size | batch_size | images_at_once": "batch_size batch bs b batchsize global_batch "
    "train_batch_size total_batch_size batch_size_per_gpu per_device_train_batch_size mini_batch_size",
    "data.micro_batch_size": "micro_batch microbatch accum accum_iter grad_accum gradient_accumulation "
    "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps update_freq",
    "data.workers | workers | jobs": "num_workers n_workers worker nworkers dataloader_workers j "
    "dataloader_num_workers",
    "views.size | size": "image_size img_size input_size crop_size imgsz resolution imsize crop im_size res "
    "global_crop_size global_crops_size",
    "short_side": "size image_size img_size resize resolution",
    "views.scale": "global_crops_scale crop_min min_scale crop_scale",
    "views.num_local_crops": "local_crops_number n_local_crops num_crops local_crops multicrop multi_crop nmb_crops",
    "views.local_size": "local_crop_size local_crops_size",
    "views.local_scale": "local_crops_scale",
    "views.jitter": "color_jitter colour_jitter",
    "model.arch | arch": "arch a model architecture backbone encoder network net model_name model.name arch_name "
    "base_encoder",
    "model.weights": "pretrained init_from checkpoint ckpt finetune_from init weights pretrained_weights "
    "init_weights from_checkpoint",
    "weights | run | runs": "model_path checkpoint ckpt checkpoint_path ckpt_path weight model_weights "
    "pretrained_weights run_dir",
    "model.embedding_dim": "dim out_dim moco_dim feat_dim proj_dim embed_dim output_dim embedding_size "
    "projection_dim",
    "model.projector_hidden": "mlp_dim hidden_dim proj_hidden hidden projector_dim moco_mlp_dim",
    "model.checkpoint_activations": "gradient_checkpointing grad_checkpointing activation_checkpointing "
    "use_checkpoint",
    "bank.rule": "method algorithm ssl_method loss_type rule",
    "bank.size": "k moco_k queue queue_size queue_len num_negatives n_negatives memory_size dictionary_size",
    "bank.lr": "memory_lr cluster_lr",
    "ema.momentum": "moco_m m ema ema_decay momentum_teacher teacher_momentum moco_momentum key_momentum",
    "loss.temperature": "t tau temp moco_t softmax_temperature",
    "precision.compute | precision": "precision amp fp16 bf16 fp32 mixed_precision dtype use_fp16 half autocast",
    "precision.compile": "compile torch_compile use_compile",
    "eval.knn_every": "eval_freq eval_every eval_interval knn_freq eval_epochs knn check_val_every_n_epoch "
    "eval_steps val_every",
    "eval.knn_k | k": "nb_knn knn_k neighbours neighbors n_neighbors",
    "gpus | processes | devices": "gpus gpu num_gpus n_gpus ngpus num_processes nproc n_gpu world_size "
    "nproc_per_node device num_devices nprocs gpu_ids",
    "format": "type fmt file_format export_format",
    "force": "overwrite f yes replace exist_ok",
    "which": "teacher student use_teacher",
    "step": "epoch checkpoint_step",
}
# What is no flag of any command, but said elsewhere: (what people type, a flag that the command has, the advice).
ELSEWHERE = (
    (
        "gpus gpu num_gpus n_gpus ngpus num_processes nproc n_gpu nproc_per_node num_devices nprocs devices nodes "
        "num_nodes nnodes",
        ("run.world_size", "world_size"),
        "the launcher says how many processes there are: accelerate launch --num_processes N -m ...",
    ),
    (
        "device cuda cpu gpu_ids accelerator use_cpu no_cuda",
        ("run.world_size", "world_size"),
        "a GPU is used where there is one; CUDA_VISIBLE_DEVICES=... before the command names others, or none",
    ),
    (
        "strategy deepspeed fsdp zero zero_stage distributed ddp sync_bn dist_url local_rank",
        ("run.world_size",),
        f"the launcher says the strategy: accelerate launch --config_file {ZERO2} -m ...",
    ),
    (
        "momentum sgd_momentum optim.momentum optim.beta1 beta1 beta2 betas",
        ("optim.name",),
        "the optimizers' own momentum is fixed; --bank.momentum and --ema.momentum are other things",
    ),
)
RECIPE_WORDS = ("recipe", "config", "cfg", "config_file", "config_path", "config_name", "yaml", "study", "c")


def distance(a: str, b: str, most: int) -> int:
    """Letters to change, add, leave out, or swap with the next, to make ``b`` of ``a``; ``most + 1`` for more."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[-1] = min(row[-1], older[j - 2] + 1)
    return min(row[-1], most + 1)


def by_table(name: str, flags: Collection[str]) -> list[str]:
    """The flag that people mean by a name, by the table; none where it is not in it."""
    for names, words in MEANT.items():
        found = [flag for flag in names.split(" | ") if flag in flags]
        if found and name in words.split():
            return found[:1]
    return []


def targets(name: str, flags: Collection[str]) -> list[str]:
    """The flag by the table, else all flags with the name as their last part."""
    return by_table(name, flags) or [flag for flag in flags if "." not in name and _last(flag) == name]


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that one misspelling, of a longer one two, makes ``name`` of: the nearest, all that are as near."""
    most = 1 if len(name) < 6 else 2
    found = {other: distance(name, other, most) for other in names if len(other) > 1}
    least = min(found.values(), default=most + 1)
    return [other for other, steps in found.items() if steps == least <= most]


def meant(name: str, flags: Collection[str]) -> list[str]:
    """The flags (or fields) that an unknown ``name`` may have meant, most often one; none where nothing is known."""
    name = name.lower()
    if found := targets(name, flags):
        return found
    if found := nearest(name, flags):
        return found
    if "." in name and (found := targets(_last(name), flags)):
        return found
    if "." not in name:
        words = dict.fromkeys(map(_last, flags))
        words |= dict.fromkeys(word for listed in MEANT.values() for word in listed.split() if len(word) > 3)
        if found := [flag for word in nearest(name, words) for flag in targets(word, flags)]:
            return list(dict.fromkeys(found))
    begun = [
        flag for flag in flags if len(name) > 2 and (flag.startswith(name) or _last(flag).startswith(name))
    ]
    return begun if len(begun) == 1 else []


def _last(flag):
    return flag.rpartition(".")[2]


def advice(name: str, flags: Mapping[str, str], usage: str = "") -> str:
    """What to say behind ``unknown flag --NAME``: `` (did you mean --FLAG?)``, where it is said instead, or nothing.

    Args:
        flags: what the command takes -> how it is written: ``--to``, or for an argument without a flag its ``METAVAR``.
        usage: words that come without a flag, and were taken off already.
    """
    if name in RECIPE_WORDS and usage:
        return f" (give {usage.strip('[]')} without a flag)"
    found = by_table(name, flags)
    for words, needed, text in ELSEWHERE:
        if not found and name in words.split() and any(flag in flags for flag in needed):
            return f" ({text.replace(ZERO2, spelled(ZERO2))})"
    found = found or meant(name, flags)
    if found and not flags[found[0]].startswith("--"):
        return f" (give {flags[found[0]]} without a flag)"
    return in_words(flags[flag] for flag in found)


def in_words(found: Iterable[str]) -> str:
    """`` (did you mean X or Y?)``, or nothing for none."""
    found = list(found)[:4]
    return f" (did you mean {' or '.join(found)}?)" if found else ""
