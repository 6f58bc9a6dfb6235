# placeholder while writing
MEDICAL_O1 = [{"Question": f"Which drug helps in case {i}?", "Complex_CoT": f"Case {i} shows sign {i * 7 % 31}.",
               "Response": f"Drug {i % 13} lowers sign {i * 7 % 31} within {i % 5 + 2} days."} for i in range(500)]


def attempts(rows):
    """A completion for each row, of six kinds: right, another row's, something behind it, a tag missing, the bare answer, two answers."""
    made = []
    for i, row in enumerate(rows):
        own, other, answer = row["target"], rows[i - 1]["target"], row["ground_truth"]
        made.append((own, other, own + "\nI hope this helps.", own.partition("\n")[2], answer, own.replace(answer, f"{answer} {answer}"))[i % 6])
    return made
