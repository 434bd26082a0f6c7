import Foundation

/// A tool that a model may call.
public struct ToolDefinition: Equatable, Sendable {
    public let name: String
    public let description: String
    /// The JSON schema of its arguments, which are an object.
    let parameters: JSON

    /// - Parameters:
    ///   - name: 1 to 64 of the characters a-z A-Z 0-9 _ -.
    ///   - description: what it does; without one, the name.
    ///   - parameters: the JSON schema of its arguments; without one it takes none.
    /// - Throws: `ApertusError`, naming the part of the schema that no prompt can be made of.
    public init(name: String, description: String = "", parameters: String = "{}") throws {
        guard isFunctionName(name) else {
            throw refusal("tool \(beginning(of: name))", functionNameRule)
        }
        self.name = name
        self.description = description.isEmpty ? name : description
        self.parameters = try Given.read(parameters.utf8, as: "parameters of tool \(name)").schema()
    }

    /// Read tools as OpenAI's API writes them.
    ///
    /// - Parameter json: a list of `{"type": "function", "function": {…}}`, or what these hold,
    ///   `{name, description, parameters}`.
    /// - Throws: `ApertusError`, naming what is wrong as `tools[1].function.name`.
    public static func list(json: Data) throws -> [ToolDefinition] {
        try list(Given.read(json, as: "tools"))
    }

    static func list(_ given: Given) throws -> [ToolDefinition] {
        var names: Set<String> = []
        return try given.list("a list of tools").map { tool in
            let definition = try ToolDefinition(tool)
            guard names.insert(definition.name).inserted else {
                let place = try tool["function"].value == nil ? tool : tool["function"]
                throw try place["name"].refuse(Self.twice(definition.name))
            }
            return definition
        }
    }

    static func requireDifferentNames(_ tools: [ToolDefinition]) throws {
        var names: Set<String> = []
        for (index, tool) in tools.enumerated() where !names.insert(tool.name).inserted {
            throw refusal("tools[\(index)].name", twice(tool.name))
        }
    }

    private static func twice(_ name: String) -> String {
        "\(beginning(of: name)) is the name of an earlier tool, too"
    }

    private init(_ tool: Given) throws {
        let kind = try tool["type"]
        guard kind.value == nil || kind.value?.text == "function" else {
            throw kind.refuse("is not supported; tools are of type 'function'")
        }
        let function = try tool["function"].value == nil ? tool : tool["function"]
        name = try function["name"].name()
        let words = try function["description"]
        let text = words.value == nil ? "" : try words.text()
        description = text.isEmpty ? name : text
        parameters = try function["parameters"].schema()
    }
}

extension Given {
    /// A schema of arguments, with what a template cannot write put right.
    fileprivate func schema() throws -> JSON {
        guard value != nil else { return .object([]) }
        let kind = try self["type"]
        guard kind.value == nil || kind.value?.text == "object" else {
            throw kind.refuse("the parameters of a function are an object")
        }
        let checked = try Given(data(), at: place).checked()
        return checked.replacing("properties") { properties in
            let members = properties.members ?? []
            return .object(members.map { .init(key: $0.key, value: $0.value.textDefault) })
        }
    }

    /// The schema, in which those that are true or false have become schemas of anything.
    private func checked() throws -> JSON {
        var schema = try object()
        for key in ["enum", "oneOf"] where try self[key].value != nil { _ = try self[key].list() }
        if try self["description"].value != nil { _ = try self["description"].text() }
        if try self["oneOf"].isTruthy {
            let choices = try self["oneOf"].list().map { try $0.checked() }
            schema = schema.replacing("oneOf") { _ in .array(choices) }
        }
        if let properties = try self["properties"].value {
            let members = try Given(properties, at: "\(place).properties").object().members ?? []
            let place = "\(self.place).properties"
            let inner = try members.map { member in
                let value: JSON = member.value.flag == nil ? member.value : .object([])
                let name = String(decoding: member.key, as: UTF8.self)
                let checked = try Given(value, at: "\(place).\(name)").checked()
                return JSON.Member(key: member.key, value: checked)
            }
            schema = schema.replacing("properties") { _ in .object(inner) }
            if try self["required"].value != nil {
                for name in try self["required"].list() { _ = try name.text() }
            }
        }
        if try self["items"].value?.members != nil {
            let items = try self["items"].checked()
            schema = schema.replacing("items") { _ in items }
        }
        return schema
    }
}

extension JSON {
    fileprivate func replacing(_ key: String, with change: (JSON) -> JSON) -> JSON {
        guard let members else { return self }
        let wanted = Array(key.utf8)
        return .object(
            members.map { each in
                each.key == wanted ? .init(key: each.key, value: change(each.value)) : each
            })
    }

    /// The schema of an argument. Beside choices a default is written as a text: it is one.
    fileprivate var textDefault: JSON {
        let hasChoices = self["enum"]?.isTruthy == true || self["oneOf"]?.isTruthy == true
        guard hasChoices else { return self }
        return replacing("default") { $0.bytes == nil ? .string(Array($0.written.utf8)) : $0 }
    }
}
