"""Turn what other trainers and methods write into PEFT LoRA folders."""
