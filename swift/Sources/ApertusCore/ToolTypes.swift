/// Tools in TypeScript, in just the form that the v1 template writes them in.
///
/// The breaks and blanks that look odd belong to the format that the models were trained on.
extension ToolDefinition {
    /// Of an element's type, beyond which an array is `any[]`; in Unicode scalars.
    private static let longestElement = 50
    private static let beforeNestedType = "\n" + String(repeating: " ", count: 16)
    private static let beforeDefaultOfAChoice = String(repeating: " ", count: 20)

    static func declarations(_ tools: [ToolDefinition]) -> String {
        tools.map(\.declaration).joined(separator: "\n")
    }

    private var declaration: String {
        let start = "// \(description)\ntype \(name) = "
        guard let properties = parameters["properties"]?.members, !properties.isEmpty else {
            return "\(start)() => any;"
        }
        let required = Self.required(parameters)
        let lines = properties.map { Self.parameter($0, isRequired: required.contains($0.key)) }
        return "\(start)(_: {\n" + lines.joined(separator: ",\n") + "\n}) => any;"
    }

    private static func required(_ schema: JSON) -> Set<[UInt8]> {
        Set(schema["required"]?.items?.compactMap(\.bytes) ?? [])
    }

    private static func name(_ member: JSON.Member, isRequired: Bool) -> String {
        String(decoding: member.key, as: UTF8.self) + (isRequired ? "" : "?") + ": "
    }

    private static func parameter(_ member: JSON.Member, isRequired: Bool) -> String {
        let spec = member.value
        let about = description(spec).map { "// \($0)\n" } ?? ""
        let text = about + name(member, isRequired: isRequired) + type(spec)
        guard let preset = spec["default"] else { return text }
        if spec["enum"]?.isTruthy == true { return "\(text), // default: \(preset.pythonText)" }
        if spec["oneOf"]?.isTruthy == true { return "\(text)// default: \(preset.pythonText)" }
        return "\(text), // default: \(preset.written)"
    }

    private static func description(_ spec: JSON) -> String? {
        spec["description"].flatMap { $0.isTruthy ? $0.pythonText : nil }
    }

    private static func type(_ spec: JSON) -> String {
        guard spec.members != nil else { return "any" }
        let kind = spec["type"]
        if kind?.text == "array" { return elementType(spec["items"]) + "[]" + orNull(spec) }
        if let kinds = kind?.items, !kinds.isEmpty {
            return kinds.map(\.pythonText).joined(separator: " | ")
        }
        if let choices = spec["oneOf"]?.items, !choices.isEmpty {
            return choices.map(choice).joined(separator: " | \n")
        }
        switch kind?.text {
        case "string":
            guard let values = spec["enum"]?.items, !values.isEmpty else {
                return "string" + orNull(spec)
            }
            return "\"" + values.map(\.pythonText).joined(separator: "\" | \"") + "\""
        case "object":
            guard let properties = spec["properties"]?.members, !properties.isEmpty else {
                return "object"
            }
            let required = required(spec)
            let fields = properties.map {
                name($0, isRequired: required.contains($0.key)) + beforeNestedType + type($0.value)
            }
            return "{\n" + fields.joined(separator: ", ") + "}"
        case "number", "integer": return "number"
        case "boolean": return "boolean"
        default: return "any"
        }
    }

    private static func elementType(_ items: JSON?) -> String {
        guard let items, items.isTruthy else { return "any" }
        switch items["type"]?.text {
        case "string": return "string"
        case "number", "integer": return "number"
        case "boolean": return "boolean"
        default:
            let text = type(items)
            let isAny = text == "object | object" || text.unicodeScalars.count > longestElement
            return isAny ? "any" : text
        }
    }

    private static func choice(_ spec: JSON) -> String {
        var text = type(spec)
        if let words = description(spec) { text += "// \(words)" }
        if let preset = spec["default"] {
            text += "\(beforeDefaultOfAChoice)// default: \(preset.written)"
        }
        return text
    }

    private static func orNull(_ spec: JSON) -> String {
        spec["nullable"]?.isTruthy == true ? " | null" : ""
    }
}
