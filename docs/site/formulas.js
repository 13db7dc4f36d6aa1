// Every element of the class "formula" holds a formula as TeX; a DIV is a line of its own.
for (const element of document.querySelectorAll(".formula")) {
  katex.render(element.textContent, element, { displayMode: element.tagName === "DIV", throwOnError: false });
}
