"""``mnemobus demo``, in parts: play.py runs it, agent.py is one of its agents, proof.py checks the result."""
