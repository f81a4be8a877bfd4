"""DPO fine-tuning of GLM-4-9B on MindSpore and MindFormers."""
