"""An OpenAI-compatible server for a trained model: python -m mindrlhf.serve CONFIG ...

The main thread runs the model (worker.py). Another thread speaks HTTP (routes.py), whose requests
and answers protocol.py checks and forms.
"""
