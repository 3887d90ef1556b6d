"""The types that flow through the system (prompts, groups, actions, candidates, experience), prompt sets and the files they come from."""
