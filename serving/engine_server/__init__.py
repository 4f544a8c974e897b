"""An inference server (vLLM, TGI) as a child process."""
