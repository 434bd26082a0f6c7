/// A value that `--json` prints, its keys in order.
enum Report {
    case object([(String, Report)])
    case list([Report])
    case text(String)
    case integer(Int)
    case number(Double)
    case flag(Bool)
    case null

    /// JSON as Python's `json.dumps(indent=2)` writes it; what a terminal would obey is escaped.
    func written(indent: String = "") -> String {
        let inner = indent + "  "
        switch self {
        case .object(let members):
            guard !members.isEmpty else { return "{}" }
            let lines = members.map { "\(inner)\(Self.quoted($0)): \($1.written(indent: inner))" }
            return "{\n\(lines.joined(separator: ",\n"))\n\(indent)}"
        case .list(let items):
            guard !items.isEmpty else { return "[]" }
            let lines = items.map { inner + $0.written(indent: inner) }
            return "[\n\(lines.joined(separator: ",\n"))\n\(indent)]"
        case .text(let text): return Self.quoted(text)
        case .integer(let number): return "\(number)"
        case .number(let number): return number.isFinite ? "\(number)" : "null"
        case .flag(let flag): return flag ? "true" : "false"
        case .null: return "null"
        }
    }

    private static func quoted(_ text: String) -> String {
        var out = String.UnicodeScalarView(["\""])
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"", "\\": out += ["\\", scalar]
            case "\n": out += "\\n".unicodeScalars
            case "\r": out += "\\r".unicodeScalars
            case "\t": out += "\\t".unicodeScalars
            case _ where Sink.isOrder(scalar):
                for unit in String(scalar).utf16 {
                    let digits = String(unit, radix: 16)
                    let zeros = String(repeating: "0", count: 4 - digits.count)
                    out += "\\u\(zeros)\(digits)".unicodeScalars
                }
            default: out.append(scalar)
            }
        }
        out.append("\"")
        return String(out)
    }
}

extension Report {
    /// A list of whole numbers.
    static func integers(_ numbers: some Sequence<Int>) -> Report {
        .list(numbers.map { .integer($0) })
    }
}
