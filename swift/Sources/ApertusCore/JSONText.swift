/// JSON as Python writes it: what a template writes into a prompt has to be the same to the byte.
extension JSON {
    /// What `json.dumps(value, ensure_ascii=False)` gives.
    package var written: String { String(decoding: writtenBytes, as: UTF8.self) }

    private var writtenBytes: [UInt8] {
        switch self {
        case .object(let members):
            let pairs = members.map { Self.quoted($0.key) + ": ".utf8 + $0.value.writtenBytes }
            return Array("{".utf8) + pairs.joined(separator: ", ".utf8) + "}".utf8
        case .array(let items):
            let values = items.map(\.writtenBytes)
            return Array("[".utf8) + values.joined(separator: ", ".utf8) + "]".utf8
        case .string(let text): return Self.quoted(text)
        case .number(let digits): return Array(Self.number(digits).utf8)
        case .bool(let flag): return Array((flag ? "true" : "false").utf8)
        case .null: return Array("null".utf8)
        }
    }

    private static func quoted(_ text: [UInt8]) -> [UInt8] {
        var out: [UInt8] = [UInt8(ascii: "\"")]
        for byte in text {
            switch byte {
            case UInt8(ascii: "\""), UInt8(ascii: "\\"): out += [UInt8(ascii: "\\"), byte]
            case 0x08: out += Array("\\b".utf8)
            case 0x09: out += Array("\\t".utf8)
            case 0x0A: out += Array("\\n".utf8)
            case 0x0C: out += Array("\\f".utf8)
            case 0x0D: out += Array("\\r".utf8)
            case 0 ..< 0x20: out += Array("\\u00".utf8) + hexadecimal(UInt32(byte), 2).utf8
            default: out.append(byte)
            }
        }
        return out + [UInt8(ascii: "\"")]
    }

    /// What `str(value)` gives.
    var pythonText: String {
        if case .string(let bytes) = self { return String(decoding: bytes, as: UTF8.self) }
        return pythonRepr
    }

    /// What `bool(value)` gives.
    var isTruthy: Bool {
        switch self {
        case .object(let members): !members.isEmpty
        case .array(let items): !items.isEmpty
        case .string(let text): !text.isEmpty
        case .number(let digits): Double(digits) != 0
        case .bool(let flag): flag
        case .null: false
        }
    }

    private var pythonRepr: String {
        switch self {
        case .object(let members):
            let pairs = members.map { "\(JSON.string($0.key).pythonRepr): \($0.value.pythonRepr)" }
            return "{" + pairs.joined(separator: ", ") + "}"
        case .array(let items): return "[" + items.map(\.pythonRepr).joined(separator: ", ") + "]"
        case .string(let bytes): return Self.repr(String(decoding: bytes, as: UTF8.self))
        case .number(let digits): return Self.number(digits)
        case .bool(let flag): return flag ? "True" : "False"
        case .null: return "None"
        }
    }

    private static func repr(_ text: String) -> String {
        let scalars = text.unicodeScalars
        let quote: Unicode.Scalar = scalars.contains("'") && !scalars.contains("\"") ? "\"" : "'"
        var out = String.UnicodeScalarView([quote])
        for scalar in scalars {
            switch scalar {
            case quote, "\\": out += ["\\", scalar]
            case "\n": out += "\\n".unicodeScalars
            case "\r": out += "\\r".unicodeScalars
            case "\t": out += "\\t".unicodeScalars
            default:
                if isPrintable(scalar) {
                    out.append(scalar)
                } else {
                    out += escaped(scalar.value).unicodeScalars
                }
            }
        }
        out.append(quote)
        return String(out)
    }

    private static func isPrintable(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.properties.generalCategory {
        case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator,
            .paragraphSeparator:
            false
        case .spaceSeparator: scalar == " "
        default: true
        }
    }

    /// A number as Python writes it: integers as they are, others in the fewest digits.
    private static func number(_ digits: String) -> String {
        guard digits.utf8.contains(where: { $0 == 0x2E || $0 | 0x20 == 0x65 }) else {
            return digits == "-0" ? "0" : digits
        }
        // Swift writes the same digits, but by exponent from another size on.
        let value = Double(digits) ?? 0
        let sign = value.sign == .minus ? "-" : ""
        let parts = value.magnitude.description.split(separator: "e")
        let point = parts[0].split(separator: ".", omittingEmptySubsequences: false)
        let fraction = point.count > 1 && point[1] != "0" ? String(point[1]) : ""
        let all = String(point[0]) + fraction
        let significant = all.drop { $0 == "0" }
        guard !significant.isEmpty else { return "\(sign)0.0" }
        let trimmed = String(significant.reversed().drop { $0 == "0" }.reversed())
        // The value is 0.trimmed times ten to this.
        let exponent = parts.count > 1 ? Int(parts[1]) ?? 0 : 0
        let power = exponent + point[0].count - (all.count - significant.count)
        guard (-3 ... 16).contains(power) else {
            let rest = trimmed.dropFirst()
            let size = abs(power - 1)
            return sign + trimmed.prefix(1) + (rest.isEmpty ? "" : ".\(rest)") + "e"
                + (power > 0 ? "+" : "-") + (size < 10 ? "0" : "") + "\(size)"
        }
        if power <= 0 { return "\(sign)0." + String(repeating: "0", count: -power) + trimmed }
        let zeros = String(repeating: "0", count: max(0, power - trimmed.count))
        let whole = trimmed.prefix(power) + zeros
        let rest = trimmed.dropFirst(power)
        return "\(sign)\(whole).\(rest.isEmpty ? "0" : rest)"
    }

    private static func escaped(_ value: UInt32) -> String {
        switch value {
        case ..<0x100: "\\x" + hexadecimal(value, 2)
        case ..<0x10000: "\\u" + hexadecimal(value, 4)
        default: "\\U" + hexadecimal(value, 8)
        }
    }

    private static func hexadecimal(_ value: UInt32, _ count: Int) -> String {
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: count - digits.count) + digits
    }
}
