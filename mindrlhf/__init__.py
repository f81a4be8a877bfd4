"""DPO for GLM-4 on MindSpore and MindFormers. README.md has a map of the modules."""
import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore logs errors only; read when it is imported
