"""What an encoder is worth: evaluation of frozen features, and fine-tuning for labels, boxes, masks and pixels.

`evaluate` measures features as they are (k-NN, linear, low-shot, retrieval). `finetune` trains an encoder with a head:
each task is a `Task` (task.py) with its data and model, and `fit.py` trains all of them in the same loop, on the same
Accelerate engine as pretraining. Both write `results.json`, which tables put side by side.
"""

KINDS = ("classification", "detection", "segmentation")
"""the tasks of `finetune`"""
