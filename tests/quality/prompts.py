"""A hundred questions."""

TOPICS = (
    "rivers", "the moon", "bread", "bicycles", "whales", "the Roman Empire", "volcanoes", "chess", "honey",
    "Paris", "photosynthesis", "the piano", "glass", "winter", "maps", "tea", "lightning", "the heart",
    "sailing ships", "paper",
)  # fmt: skip
QUESTIONS = (
    "What are three facts about {}?",
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Why do people care about {}? Answer in one sentence.",
    "I am writing a book in which {} play a large part, and its reader knows little. How should it begin?",
)
PROMPTS = tuple(question.format(topic) for question in QUESTIONS for topic in TOPICS)


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
