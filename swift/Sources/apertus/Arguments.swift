import ApertusCore
import Foundation

/// An option of a command: how it is written and what it takes.
struct Option: Sendable {
    enum Kind: Sendable {
        /// Nothing.
        case flag
        /// Nothing; `--no-NAME` says the opposite.
        case flagOrNot
        case text
        case integer(ClosedRange<Int>)
        case number(ClosedRange<Double>)
    }

    /// The long one first.
    let names: [String]
    let kind: Kind
    let words: String
    let isRepeatable: Bool

    init(_ names: String..., kind: Kind, _ words: String, isRepeatable: Bool = false) {
        (self.names, self.kind, self.words) = (names, kind, words)
        self.isRepeatable = isRepeatable
    }

    var name: String { names[0] }
}

/// What may follow a command's name.
struct Grammar: Sendable {
    let command: String
    let words: String
    /// Names of what stands without an option, in order.
    var operands: [String] = []
    let options: [Option]

    static let help = Option("--help", "-h", kind: .flag, "Show this message and exit.")

    /// What `--help` prints.
    var help: String {
        let all = options + [Self.help]
        let rows = all.map { ("  " + spelled($0), $0.words) }
        let width = min(34, (rows.map(\.0.count).max() ?? 0) + 2)
        let lines = rows.map { left, right in
            left.count < width
                ? left.padding(toLength: width, withPad: " ", startingAt: 0) + right
                : left + "\n" + String(repeating: " ", count: width) + right
        }
        let usage = operands.map { " \($0)" }.joined()
        return "Usage: apertus \(command) [OPTIONS]\(usage)\n\n  \(words)\n\nOptions:\n"
            + lines.joined(separator: "\n")
    }

    private func spelled(_ option: Option) -> String {
        var names = option.names.joined(separator: ", ")
        switch option.kind {
        case .flag: break
        case .flagOrNot: names += " / --no-" + option.name.dropFirst(2)
        case .text: names += " TEXT"
        case .integer: names += " INT"
        case .number: names += " NUMBER"
        }
        return names
    }
}

/// What somebody wrote behind a command's name, each value checked.
///
/// Strict: an option that is not there, a value that is none, one that stands twice, and an operand
/// too many are refused; options are not abbreviated.
struct Arguments {
    private var values: [String: [String]] = [:]
    private(set) var operands: [String] = []
    private(set) var wantsHelp = false

    /// - Throws: `ApertusError` of kind `usage`, naming the option.
    init(_ words: [String], _ grammar: Grammar) throws {
        var rest = words[...]
        var takesOptions = true
        while let word = rest.popFirst() {
            guard takesOptions, word.hasPrefix("-"), word != "-" else {
                operands.append(word)
                continue
            }
            if word == "--" {
                takesOptions = false
                continue
            }
            var (name, given) = (word, String?.none)
            if word.hasPrefix("--"), let equals = word.firstIndex(of: "=") {
                (name, given) = (
                    String(word[..<equals]), String(word[word.index(after: equals)...])
                )
            }
            if Grammar.help.names.contains(name) {
                wantsHelp = true
                continue
            }
            try take(name, given, &rest, grammar)
        }
        guard operands.count <= grammar.operands.count || wantsHelp else {
            throw Self.wrong(
                "unexpected argument \(operands[grammar.operands.count].debugDescription)", grammar)
        }
    }

    private mutating func take(
        _ name: String, _ given: String?, _ rest: inout ArraySlice<String>, _ grammar: Grammar
    ) throws {
        let negated = grammar.options.first { option in
            if case .flagOrNot = option.kind { return name == "--no-" + option.name.dropFirst(2) }
            return false
        }
        guard let option = negated ?? grammar.options.first(where: { $0.names.contains(name) })
        else {
            if ModelOptions.missing.contains(name) {
                throw ApertusError(.usage, "\(name) is there in apertus-mlx alone")
            }
            throw Self.wrong("no such option: \(name)", grammar)
        }
        var value = ""
        switch option.kind {
        case .flag, .flagOrNot:
            guard given == nil else { throw Self.wrong("\(name) takes no value", grammar) }
            value = negated == nil ? "yes" : "no"
        case .text, .integer, .number:
            guard let found = given ?? rest.popFirst() else {
                throw Self.wrong("\(name) needs a value", grammar)
            }
            value = found
        }
        guard option.isRepeatable || values[option.name] == nil else {
            throw Self.wrong("\(name) stands twice", grammar)
        }
        try Self.check(value, name, option.kind)
        values[option.name, default: []].append(value)
    }

    private static func check(_ value: String, _ name: String, _ kind: Option.Kind) throws {
        let shown = String(value.prefix(40)).debugDescription
        switch kind {
        case .integer(let range):
            guard let number = Int(value), range.contains(number) else {
                throw ApertusError(
                    .usage,
                    "\(name) \(shown): expected a whole number, \(range.lowerBound) to "
                        + "\(range.upperBound)")
            }
        case .number(let range):
            guard let number = Double(value), range.contains(number) else {
                throw ApertusError(
                    .usage,
                    "\(name) \(shown): expected a number, \(range.lowerBound) to "
                        + "\(range.upperBound)"
                )
            }
        case .flag, .flagOrNot, .text: break
        }
    }

    private static func wrong(_ what: String, _ grammar: Grammar) -> ApertusError {
        ApertusError(.usage, "\(what); see `apertus \(grammar.command) --help`")
    }

    func has(_ name: String) -> Bool { values[name]?.last == "yes" }
    /// Nil where neither the option nor its opposite was given.
    func flag(_ name: String) -> Bool? { values[name]?.last.map { $0 == "yes" } }
    func text(_ name: String) -> String? { values[name]?.last }
    func file(_ name: String) -> URL? { text(name).map { URL(fileURLWithPath: $0) } }
    func texts(_ name: String) -> [String] { values[name] ?? [] }
    func integer(_ name: String) -> Int? { text(name).flatMap { Int($0) } }
    func number(_ name: String) -> Double? { text(name).flatMap { Double($0) } }
}
