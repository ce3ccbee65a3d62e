"""For faults_vs_hf_trainer.py: a plain script around Hugging Face's Trainer, and faults planted into it."""
